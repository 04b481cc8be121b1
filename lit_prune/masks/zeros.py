"""Zeros in tensors, and in the linears that a model's record lists as pruned: their counts, and casts that add none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.models import structure
from lit_prune.models.families import Block, find_blocks

# Share of zeros without a record above which they count as a mask. Dequantised weights have zeros too: a normal weight
# is rounded to zero by Q4_K in 5%, by NF4 in 10% and by 3 bits in up to 20% of the cases.
MASK_SHARE = 0.25


def zeros(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Returns the number of elements that are exactly zero, and the number of all elements."""
    zero = total = 0
    for tensor in tensors:
        zero += tensor.numel() - int(torch.count_nonzero(tensor))
        total += tensor.numel()
    return zero, total


def cast(weight: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``weight`` in ``dtype``, kept weights that would round to 0 as the smallest normal number."""
    # every zero counts as pruned, in the sparsity as well as in the masks of later training
    converted = weight.to(dtype)
    return torch.where(keep & (converted == 0), torch.finfo(dtype).tiny, converted)


def pruned_blocks(model: PreTrainedModel) -> list[Block]:
    """Returns the blocks of ``model``, which must have no adapter, with the linears that its record lists as pruned."""
    recipe = structure.record(model).get("recipe") or {}
    chosen = {field: recipe[field] for field in ("targets", "ignore", "blocks") if recipe.get(field)}
    return find_blocks(model, **chosen, quantised=True)


def zero_shares(model: PreTrainedModel) -> tuple[list[float], float]:
    """Returns the share of zeros in the pruned linears of each block and of all; ``model`` must have no adapter."""
    blocks = pruned_blocks(model)
    return [block.pruned / block.size for block in blocks], share_of_zeros(blocks)


def share_of_zeros(blocks: Sequence[Block]) -> float:
    """Returns the share of zeros in the linears of ``blocks``."""
    return sum(block.pruned for block in blocks) / sum(block.size for block in blocks)
