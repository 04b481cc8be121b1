"""Statistics behind pruned blocks, for the trials of methods that prune by these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream, on_device
from lit_prune.models.families import Block
from lit_prune.progress import track


@dataclass(frozen=True)
class Observation:
    """What is observed of a block, and the weights that a cut by it leaves.

    Attributes:
        observe: Function of a stream, which it does not advance, the block that it is in front of, and the targets,
            that returns the statistics.
        cut: Function of a block and its statistics that returns the pruned weights of its linears.
        compares: Whether the targets are the outputs of the dense block behind dense ones, one for every batch; else
            they are None.
        settled: Function of a block that returns modules whose weights and inputs neither this cut nor a later one
            changes; from here on they are computed once. None for none.
    """

    observe: Callable[[Stream, Block, Sequence[Tensor] | None], BlockStatistics]
    cut: Callable[[Block, BlockStatistics], Mapping[str, Tensor]]
    compares: bool = False
    settled: Callable[[Block], Sequence[nn.Module]] | None = None


@torch.no_grad()
def statistics_behind_pruned(
    blocks: Sequence[Block], observations: Sequence[Observation], *, stream: Stream, device: torch.device
) -> list[BlockStatistics]:
    """Returns the statistics of every dense block behind blocks that are pruned; the weights come back.

    A cut with ``propagate: pruned`` prunes by the inputs that the pruned blocks before pass on. Weights that are pruned
    by the inputs of the unpruned model are so much worse (see docs/results.md) that a search among them finds rates
    that suit these, and not the cut. The inputs depend on the rates of the blocks before; those of the rates that the
    search starts from are close to them for all rates that it tries, and the weights at the start are those of the cut.

    Args:
        blocks: The blocks, dense.
        observations: One, or one for every part of a block, each behind the parts before it.
        stream: The stream in front of the first block.
        device: Device on which a block computes; the statistics come back to where its weights were.
    """
    found = []
    dense = stream.copy() if any(each.compares for each in observations) else None
    for block in track(blocks, "Observing pruned blocks"):
        home, observed = next(block.module.parameters()).device, BlockStatistics()
        with on_device(block, device), ExitStack() as pruned:
            if dense is not None:
                dense.run(block)
            for each in observations:
                if each.settled is not None and block is not blocks[-1]:
                    pruned.enter_context(stream.once(each.settled(block)))
                own = each.observe(stream, block, dense.hidden if dense is not None and each.compares else None)
                observed = observed.with_linears_of(own)
                if block is not blocks[-1] or each is not observations[-1]:
                    pruned.enter_context(_pruned(block, each.cut(block, own)))
            if block is not blocks[-1]:
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
