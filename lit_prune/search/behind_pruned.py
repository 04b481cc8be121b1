"""Statistics behind pruned blocks, for the trials of methods that prune by these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream, on_device
from lit_prune.models.families import Block
from lit_prune.progress import track

Cut = Callable[[Block, BlockStatistics], Mapping[str, Tensor]]
Observe = Callable[[Stream, Block], BlockStatistics]


@torch.no_grad()
def statistics_behind_pruned(
    blocks: Sequence[Block], cut: Cut, observe: Observe, *, stream: Stream, device: torch.device
) -> list[BlockStatistics]:
    """Returns the statistics of every dense block behind blocks that are pruned; the weights come back.

    A cut with ``propagate: pruned`` prunes by the inputs that the pruned blocks before pass on. Weights that are pruned
    by the inputs of the unpruned model are so much worse (see docs/results.md) that a search among them finds rates
    that suit these, and not the cut. The inputs depend on the rates of the blocks before; those of the rates that the
    search starts from are close to them for all rates that it tries, and the weights at the start are those of the cut.

    Args:
        blocks: The blocks, dense, with the linears that the cut prunes.
        cut: Function of a block and its statistics that returns the pruned weights of its linears.
        observe: Function of a stream, which it does not advance, and the dense block that it is in front of, that
            returns the statistics.
        stream: The stream in front of the first block.
        device: Device on which a block computes; the statistics come back to where its weights were.
    """
    found = []
    for block in track(blocks, "Observing pruned blocks"):
        home = next(block.module.parameters()).device
        with on_device(block, device):
            observed = observe(stream, block)
            if block is not blocks[-1]:
                with _pruned(block, cut(block, observed)):
                    stream.run(block)
        found.append(observed.to(home))
    return found


@contextmanager
def _pruned(block: Block, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives ``block`` the pruned weights for the context."""
    dense = {name: block.linears[name].weight_OI.clone() for name in weights}
    try:
        for name, weight_OI in weights.items():
            block.linears[name].write(weight_OI)
        yield
    finally:
        for name, weight_OI in dense.items():
            block.linears[name].write(weight_OI)
