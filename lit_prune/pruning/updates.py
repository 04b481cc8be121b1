"""What methods have in common that also update the weights they keep, from the Gram matrix of the input.

Suffixes: O output channels, I input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.errors import InputError

DEAD_COLUMN = 1e-24  # factor of the scores in dead columns, so that they are the smallest


def cast(weight_OI: Tensor, keep_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``weight_OI`` in ``dtype``, kept weights that would round to 0 as the smallest normal number."""
    # every zero counts as pruned, in the sparsity as well as in the masks of later training
    cast_OI = weight_OI.to(dtype)
    return torch.where(keep_OI & (cast_OI == 0), torch.finfo(dtype).tiny, cast_OI)


def not_finite() -> InputError:
    """Returns the error for a Gram matrix with NaN or infinity."""
    return InputError(
        "`calibration` must give linears finite inputs, got NaN, infinity, or numbers whose squares overflow: the "
        "weights are broken, or `model.dtype` is too small for them (try float32 or bfloat16)."
    )
