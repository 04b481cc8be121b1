"""What methods have in common that also update the weights they keep, from the Gram matrix of the input."""

from __future__ import annotations

from lit_prune.errors import InputError

DEAD_COLUMN = 1e-24  # factor of the scores in dead columns, so that they are the smallest


def not_finite() -> InputError:
    """Returns the error for a Gram matrix with NaN or infinity."""
    return InputError(
        "`calibration` must give linears finite inputs, got NaN, infinity, or numbers whose squares overflow: the "
        "weights are broken, or `model.dtype` is too small for them (try float32 or bfloat16)."
    )
