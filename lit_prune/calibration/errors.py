"""The error that a block inherits from the blocks before it, and what of it an input of the block can predict.

Suffixes: B batch, T tokens, D hidden size, I input channels, P unmasked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_prune import distributed
from lit_prune.calibration.statistics import InputGram
from lit_prune.calibration.stream import Stream
from lit_prune.models.families import Block
from lit_prune.models.linears import PrunableLinear, watching


@final
@dataclass(frozen=True)
class ErrorMoments:
    """Moments of the input x of a linear and of the error of its block's output, e = target - output, as sums.

    Attributes:
        gram_II: Sum over tokens of x x^T, fp32.
        cross_ID: Sum over tokens of x e^T, fp32.
        tokens: Number of tokens.
    """

    gram_II: Tensor
    cross_ID: Tensor
    tokens: int

    def __add__(self, other: ErrorMoments) -> ErrorMoments:
        """Returns the moments over the tokens of both."""
        return ErrorMoments(self.gram_II + other.gram_II, self.cross_ID + other.cross_ID, self.tokens + other.tokens)


@torch.no_grad()
def observe_errors(
    stream: Stream, block: Block, linear: PrunableLinear, targets: Sequence[Tensor], *, constant: bool = False
) -> tuple[ErrorMoments, ErrorMoments]:
    """Returns the moments over every other batch of the stream, which does not advance, and over those between.

    A token with x = [1, 2], the output [3, 3] and the target [3, 4] has e = [0, 1].

    Args:
        stream: The stream in front of ``block``.
        block: The block, on the stream's device.
        linear: A linear of the block.
        targets: The output that the block should have, (B, T, D) for every batch.
        constant: Whether a channel of ones is appended to the input.
    """
    halves = [_Sums(linear, stream.device, constant) for _ in range(2)]
    inputs: list[Tensor] = []
    with watching([linear], lambda _name, x_BTI, _rows: inputs.append(x_BTI)):
        for index, target_BTD in enumerate(targets):
            y_BTD = stream.output(index, block)
            x_BTI = inputs.pop().view(*y_BTD.shape[:-1], -1)
            error_BTD = target_BTD.to(y_BTD) - y_BTD
            number = distributed.rank() + index * distributed.world_size()  # of the batch among those of all processes
            halves[number % 2].update(stream.unmasked(index, x_BTI), stream.unmasked(index, error_BTD))
    return halves[0].moments(), halves[1].moments()


class _Sums:
    """The sums over some batches."""

    def __init__(self, linear: PrunableLinear, device: torch.device, constant: bool) -> None:
        outputs, inputs = linear.weight_OI.shape
        self.width, self.constant = inputs + constant, constant
        self.gram, self.cross_ID = InputGram(), torch.zeros(self.width, outputs, device=device)

    def update(self, x_PI: Tensor, error_PD: Tensor) -> None:
        """Adds the positions of a batch, in fp32."""
        x_PI = F.pad(x_PI.float(), (0, 1), value=1.0) if self.constant else x_PI.float()
        self.gram.update(x_PI)
        self.cross_ID.addmm_(x_PI.T, error_PD.float())

    def moments(self) -> ErrorMoments:
        """Returns the sums over all processes."""
        self.gram.sum_over_processes(self.width)
        gram_II = self.gram.gram() * self.gram.tokens
        return ErrorMoments(gram_II.to(self.cross_ID), distributed.all_reduce_sum(self.cross_ID), self.gram.tokens)
