"""What a linear of a block writes, and whether it is added to the residual stream as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lit_prune.calibration.stream import Stream
from lit_prune.models.families import Block
from lit_prune.models.linears import PrunableLinear


@torch.no_grad()
def is_added(stream: Stream, block: Block, writer: PrunableLinear) -> bool:
    """Returns whether the output of ``writer`` is added to the residual stream as it is.

    It is not in families that normalise it first, such as Gemma 2, or multiply it, such as Granite. Whether it is, is
    tried with the first batch of ``stream``, with and without the output.

    Args:
        stream: The stream in front of ``block``, which it does not advance.
        block: The block, on the stream's device.
        writer: A linear of the block, nothing behind which reads its output.
    """
    with outputs_of(writer, stream.device) as outputs:
        y_BTD = stream.output(0, block).float()
    with _silent(writer):
        silent_BTD = stream.output(0, block).float()
    written_BTD = outputs[0].float().view_as(y_BTD)
    added_BTD, eps = y_BTD - silent_BTD, torch.finfo(writer.weight_OI.dtype).eps
    if (added_BTD - written_BTD).norm() > 0.02 * written_BTD.norm() + 4 * eps * y_BTD.norm():
        return False
    # where the stream is large, rounding hides a factor: it shows in the elements in which the output stands out
    clear_BTD = written_BTD.abs() > 16 * eps * y_BTD.abs()
    factors = (added_BTD / written_BTD)[clear_BTD]
    return not len(factors) or abs(float(factors.median()) - 1) <= 0.02


@contextmanager
def outputs_of(writer: PrunableLinear, device: torch.device) -> Iterator[list[Tensor]]:
    """Collects copies of the outputs of a linear, one for every batch: Falcon adds to them in place."""
    outputs: list[Tensor] = []
    hook = writer.module.register_forward_hook(lambda _module, _args, y: outputs.append(y.to(device, copy=True)))
    try:
        yield outputs
    finally:
        hook.remove()


@contextmanager
def _silent(writer: PrunableLinear) -> Iterator[None]:
    """Replaces the output of a linear by zeros for the context."""
    hook = writer.module.register_forward_hook(lambda _module, _args, y: torch.zeros_like(y))
    try:
        yield
    finally:
        hook.remove()
