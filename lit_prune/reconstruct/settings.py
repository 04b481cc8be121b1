"""The settings of a reconstruction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, final, get_args

from lit_prune.errors import InputError

Source = Literal["dense", "pruned"]


@final
@dataclass(frozen=True)
class Reconstruct:
    """Training of every block, right after it is cut, towards the output that it had before (EBFT, arXiv 2402.12419).

    A block reads the calibration windows as the blocks before it, pruned and reconstructed, pass them on. All its
    remaining parameters are trained, one batch of windows a step, by AdamW with betas of 0.9 and 0.95 in float32 and a
    learning rate that falls linearly to 0. The loss of a token is |y' - y|^2 / |y|^2; zeros stay zero. The last eighth
    of the batches is held out: a block whose loss on them did not get smaller is trained again with a quarter and a
    sixteenth of the learning rate, and at last keeps the weights of the cut.

    Args:
        epochs: Passes over the training batches, for every block.
        lr: Learning rate of the first step.
        targets_from: The input from which the dense block computes the targets: `dense`, the output of the dense
            blocks before it, or `pruned`, what the pruned block reads. `dense` corrects errors of earlier blocks too.
        weight_decay: Decoupled weight decay.
        max_norm: Norm to which the gradient of the block is clipped.
        seed: Seed of the order of the batches.
        state: Folder for the weights of finished blocks, from which the same cut resumes after an interrupt; null
            keeps none. It takes as many bytes as the blocks, and may be deleted afterwards.

    Raises:
        InputError: for a number out of its range.
    """

    epochs: int = 4
    lr: float = 2e-3
    targets_from: Source = "dense"
    weight_decay: float = 0.1
    max_norm: float = 1.0
    seed: int = 0
    state: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InputError(
                f"`pruning.reconstruction.epochs` must be at least 1, got {self.epochs}; to cut without it leave "
                "`pruning.reconstruction` out."
            )
        for name in ("lr", "max_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(
                    f"`pruning.reconstruction.{name}` must be above 0, and finite, got {getattr(self, name)}."
                )
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"`pruning.reconstruction.weight_decay` must be at least 0, got {self.weight_decay}.")
        if self.targets_from not in get_args(Source):
            raise InputError(
                f"`pruning.reconstruction.targets_from` must be one of {', '.join(get_args(Source))}, got "
                f"{self.targets_from!r}."
            )
