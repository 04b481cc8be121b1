"""What a method is: how the blocks of a model become smaller, by masks or otherwise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune import structure
from lit_prune.calibrate import Observed, Stream, observe, on_device
from lit_prune.evaluate import zeros
from lit_prune.families import Block
from lit_prune.progress import track

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
    """A method that sets weights to zero, one linear at a time."""

    @abstractmethod
    def prune(self, weight_OI: Tensor, norm_I: Tensor | None, rate: float) -> Tensor:
        """Returns a pruned copy of one weight, removed entries exactly 0; the input is left as it is.

        Args:
            weight_OI: The weight, (out, in).
            norm_I: ||X_j||, root mean square of each input channel, fp32; None where ``needs`` does not ask for it.
            rate: Share to remove, in [0, 1].
        """

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the number of prunable weights of each block."""
        return [block.size for block in blocks]

    def taken(self, block: Block) -> float:
        """Returns the share of the block's prunable weights that is exactly zero."""
        zero, total = zeros(linear.weight for linear in block.linears.values())
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
                seen = observed[block.index] if walk is None else observe(walk, block, self.needs, advance=False)
                self._prune_block(block, seen, rate)
                if walk is not None and block is not blocks[-1]:
                    walk.run(block)
        structure.write(model, masked=True)
        return [self.taken(block) for block in blocks]

    @torch.no_grad()
    def _prune_block(self, block: Block, observed: Observed, rate: float) -> None:
        for name, linear in block.linears.items():
            linear.weight.copy_(self.prune(linear.weight, observed.norms.get(name), rate))
