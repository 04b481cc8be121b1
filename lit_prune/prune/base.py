"""What a method is: how the blocks of a model become smaller, by masks or otherwise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune import structure
from lit_prune.calibrate import Observed, Seen, Stream, observe, on_device
from lit_prune.evaluate import zeros
from lit_prune.families import Block
from lit_prune.progress import track
from lit_prune.prune.patterns import Pattern

Propagate = Literal["dense", "pruned"]


class Method(ABC):
    """How every block of a model gives the share that its rate says.

    Attributes:
        needs: The statistics that the method reads, of those in ``lit_prune.calibrate``.
        propagate: `dense`: the statistics of the one pass over the unpruned model serve for scoring and pruning alike.
            `pruned`: each block sees what the pruned blocks before it give, which takes more passes.
        chooses_linears: Whether `targets` and `ignore` mean anything to the method.
        changes_shapes: Whether weights become smaller, so that the model's parameters and its speed change.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    chooses_linears: ClassVar[bool] = True
    changes_shapes: ClassVar[bool] = False
    propagate: Propagate

    def check(self, model: PreTrainedModel, sparsity: float) -> None:  # noqa: B027 (most have nothing to check)
        """Raises InputError where the method cannot take ``sparsity`` from ``model``, before anything is done to it."""

    @abstractmethod
    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns what each block has to give, in the unit that rates are a share of."""

    def taken(self, block: Block) -> float:
        """Returns the share of ``block`` that is gone already, and counts toward its rate."""
        return 0.0

    def most(self, model: PreTrainedModel) -> float:
        """Returns the greatest rate that a block of ``model`` can have."""
        return 1.0

    @abstractmethod
    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        observed: Sequence[Observed],
        device: torch.device,
        stream: Callable[[], Stream],
    ) -> list[float]:
        """Takes from every block of ``model``, in place; returns the share that each has given.

        Args:
            model: The causal LM, in eval mode.
            blocks: Its blocks.
            rates: The share that each block is to give.
            observed: Statistics of each block of the unpruned model, as far as ``needs`` and ``propagate`` ask.
            device: Where a block computes.
            stream: Gives the calibration batches standing before the first block.
        """


class MaskMethod(Method):
    """A method that sets weights to zero, in the linears of one input at a time."""

    @abstractmethod
    def prune(self, weights: Sequence[Tensor], seen: Seen, rate: float) -> list[Tensor]:
        """Returns pruned copies of the weights, removed entries exactly 0; what is given is left as it is.

        Of each weight round(numel * rate) entries go.

        Args:
            weights: Of linears that share one input (q, k, v; gate, up), each (out, in), contiguous.
            seen: What is known of that input, as far as ``needs`` asks, on the weights' device.
            rate: Share to remove, in [0, 1].
        """

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of prunable weights of each block."""
        return [block.size for block in blocks]

    def taken(self, block: Block) -> float:
        """Returns the share of the block's prunable weights that is exactly zero."""
        zero, total = zeros(linear.weight_OI for linear in block.linears.values())
        return zero / total

    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        observed: Sequence[Observed],
        device: torch.device,
        stream: Callable[[], Stream],
    ) -> list[float]:
        """Prunes block after block; see :meth:`Method.apply`."""
        walk = stream() if self.needs and self.propagate == "pruned" else None
        for block, rate in zip(track(blocks, "Pruning blocks"), rates, strict=True):
            with on_device(block, device):
                self._prune_next(walk, block, observed[block.index], rate)
                if walk is not None and block is not blocks[-1]:
                    walk.run(block)
        structure.write(model, masked=True)
        return [self.taken(block) for block in blocks]

    @torch.no_grad()
    def _prune_next(self, walk: Stream | None, block: Block, observed: Observed, rate: float) -> None:
        """Prunes the block that ``walk`` stands before; its statistics are gone before the next block's are taken."""
        if walk is not None:
            observed = observe(walk, block, self.needs, advance=False)
        for names in observed.groups(block.linears):
            weights = [block.linears[name].weight_OI.contiguous() for name in names]
            seen = observed.seen(names[0]).to(weights[0].device)
            for name, weight_OI in zip(names, self.prune(weights, seen, rate), strict=True):
                block.linears[name].write(weight_OI)


class ScoredMethod(MaskMethod):
    """A mask method that gives every weight a score by itself, and removes where scores are smallest.

    Attributes:
        pattern: How the removals may lie.
        by_row: Compare scores within each output row, not over the whole matrix.
    """

    by_row: ClassVar[bool]
    pattern: Pattern | None

    @abstractmethod
    def score(self, weight_OI: Tensor, seen: Seen) -> Tensor:
        """Returns the score of every entry, at least 0, fp32; larger is kept."""

    def prune(self, weights: Sequence[Tensor], seen: Seen, rate: float) -> list[Tensor]:
        """Returns each weight with its smallest scores set to 0; what is gone already goes first."""
        assert self.pattern is not None
        pruned = []
        for weight_OI in weights:
            score_OI = self.score(weight_OI, seen).masked_fill(weight_OI == 0, -1)
            pruned.append(torch.where(self.pattern.keep(score_OI, rate, by_row=self.by_row), weight_OI, 0))
        return pruned
