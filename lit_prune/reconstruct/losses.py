"""The losses of a reconstruction: how far a block's output is from its target.

Suffixes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lit_prune import distributed


def relative_errors(y_BTD: Tensor, target_BTD: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the sum over unmasked tokens of |y - target|^2 / |target|^2, and the number of those tokens.

    Without the division, the massive activation of the first token, which many models have, is nearly all of the loss,
    and nothing else is learnt. An output of [3, 5] for the target [3, 4] gives 1 / 25.

    Args:
        y_BTD: Output of the block.
        target_BTD: The output that it should have.
        mask_BT: True for tokens that count; None counts all.
    """
    target_BTD = target_BTD.float()
    size_BT = target_BTD.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    error_BT = (y_BTD.float() - target_BTD).square().sum(-1) / size_BT
    if mask_BT is None:
        return error_BT.sum(), error_BT.new_tensor(error_BT.numel())
    mask_BT = mask_BT.to(error_BT.device).expand_as(error_BT)
    return torch.where(mask_BT, error_BT, 0).sum(), mask_BT.sum()


class MeanError:
    """The mean of :func:`relative_errors` over the batches of all processes."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def add(self, total: Tensor, tokens: Tensor) -> None:
        """Adds a batch; nothing is copied from the device before :meth:`mean`."""
        self.sums.append(torch.stack([total.detach(), tokens.to(total.dtype)]))

    def mean(self) -> float:
        """Returns the mean error of a token; NaN without tokens."""
        sums = torch.stack(self.sums).cpu().double().sum(0) if self.sums else torch.zeros(2, dtype=torch.float64)
        total, tokens = distributed.all_reduce_sum(sums).tolist()
        return total / tokens if tokens else float("nan")


@final
@dataclass(frozen=True)
class BlockLosses:
    """The losses of one block, see :func:`relative_errors`, before and after its reconstruction.

    Attributes:
        train_before: Loss on the training batches after the cut.
        train_after: The same with the weights that the block was left with.
        held_out_before: Loss on the batches that it was not trained on, after the cut.
        held_out_after: The same after the last training, not finite if it diverged.
        kept: Whether the trained weights were kept; if not, the block has those of the cut.
    """

    train_before: float
    train_after: float
    held_out_before: float
    held_out_after: float
    kept: bool
