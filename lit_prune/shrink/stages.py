"""Cuts of a whole model before those of the parts of its blocks, which together leave one number of parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from lit_prune.allocate.base import meet_budget, weighted_mean
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.families import Block, find_blocks
from lit_prune.pruning.base import Method

BISECTIONS = 60
LARGEST = 1e9  # an amount at which every cut removes as much as it can


class Pools(NamedTuple):
    """The parameters of a model: those of its blocks and all others."""

    blocks: float
    others: float

    @property
    def total(self) -> float:
        """All parameters."""
        return self.blocks + self.others

    def without(self, covered: tuple[float, float], gone: float) -> Pools:
        """Returns what is left where a cut of those shares of the two that are ``covered`` removes ``gone``."""
        return Pools(*(pool * (1 - share * gone) for pool, share in zip(self, covered, strict=True)))

    @classmethod
    def of(cls, model: PreTrainedModel, blocks: Sequence[Block]) -> Pools:
        """Returns those of ``model``, tied weights counted once."""
        in_blocks = sum(parameters(block.module) for block in blocks)
        return cls(in_blocks, parameters(model) - in_blocks)


Left = Callable[[Pools, float], Pools]


class Stage(Protocol):
    """One of several cuts that share a target."""

    def left(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Left:
        """Returns a function that tells what the cut leaves of pools.

        Its second argument is the amount: the cut removes that times its weight, or as much as it can.
        """


@dataclass(frozen=True)
class WholeStage:
    """The cut of a model as a whole, by one rate.

    Args:
        method: The method.
        weight: Its rate relative to those of the other parts.
    """

    method: Method
    weight: float

    def left(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Left:
        """Returns what the cut leaves; see :class:`Stage`."""
        current, most = self._bounds(model, blocks)
        covered = self.method.coverage(model, blocks)
        return lambda pools, amount: pools.without(covered, min(amount * self.weight, (most - current) / (1 - current)))

    def rates(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        amount: float,
        least: float | None,
    ) -> list[float]:
        """Returns the rates that the method supports at ``amount``.

        Args:
            model: The model, as the cuts before have left it.
            blocks: Its blocks.
            rates: Their rates by the allocation, which may tell what goes first.
            amount: The amount.
            least: Number of parameters that a later cut must find, so that fewer go where rounding would remove more;
                None rounds to the nearest.
        """
        sizes, pools, covered = self.method.sizes(model, blocks), Pools.of(model, blocks), self.method.coverage
        current, most = self._bounds(model, blocks)
        share, middle = min(current + (1 - current) * amount * self.weight, most), sum(rates) / len(rates)
        while True:
            found = self.method.rates([share + rate - middle for rate in rates], sizes)
            gone = (sum(found) / len(found) - current) / (1 - current)
            if least is None or gone <= 0 or pools.without(covered(model, blocks), gone).total >= least:
                return found
            share -= 2 * self.method.rounding(blocks)

    def _bounds(self, model: PreTrainedModel, blocks: Sequence[Block]) -> tuple[float, float]:
        """Returns the rate of earlier cuts and the largest rate."""
        most = min(self.method.max_rate(model), self.method.max_sparsity(model, blocks))
        return self.method.current_rates(model, blocks)[0], most


class PartsMethod(Method):
    """A method that makes several parts of every block smaller, by rates of the blocks."""

    @abstractmethod
    def share_at(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Callable[[float], float]:
        """Returns the function of an amount that gives the share of all blocks that goes with it.

        Every part loses the amount times its weight, of what it has now, or as much as it can.
        """


@dataclass(frozen=True)
class PartsStage:
    """The cut of the parts of the blocks, which makes up for the rounding of the cuts before.

    Args:
        method: The method.
    """

    method: PartsMethod

    def left(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Left:
        """Returns what the cut leaves; see :class:`Stage`."""
        share_at = self.method.share_at(model, blocks)
        return lambda pools, amount: pools.without((1.0, 0.0), share_at(amount))

    def rates(
        self, model: PreTrainedModel, blocks: Sequence[Block], *, rates: Sequence[float], target: float
    ) -> list[float]:
        """Returns rates that leave ``target`` parameters, or as nearly as can be, apart like those of the allocation.

        Args:
            model: The model, as the cuts before have left it.
            blocks: Its blocks.
            rates: Their rates by the allocation.
            target: Number of parameters to leave.
        """
        removable, total = self.method.removable(model, blocks), self.method.full_parameters(model, blocks)
        lower, upper = self.method.current_rates(model, blocks), self.method.max_rate(model)
        possible = [weighted_mean(bound, removable) for bound in (lower, [max(upper, low) for low in lower])]
        mean = min(max((total - target) / sum(removable), possible[0]), possible[1])
        return meet_budget(
            lambda amount: [rate + amount for rate in rates], mean, sizes=removable, lower=lower, upper=upper
        )


@dataclass(frozen=True)
class Stages:
    """Cuts of one model that share a target: of the whole first, then of the parts of the blocks.

    The rate of a part is the share of it that goes, of the model as it is. All rates are one amount, times the weights,
    which leaves the target; it is found anew after every cut, so that later cuts make up for the rounding of
    earlier ones. The size of a block is the number of its parameters and its share of those outside the blocks, in
    equal parts, so that the mean of the rates is the share of all parameters.

    Args:
        whole: The cuts of the model as a whole, in their order.
        parts: The cut of the parts of the blocks; None without one.
    """

    whole: Sequence[WholeStage]
    parts: PartsStage | None

    @property
    def _all(self) -> list[WholeStage | PartsStage]:
        return [*self.whole, *([] if self.parts is None else [self.parts])]

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the size of each block of the model as it is; their sum is the number of its parameters."""
        return _with_others([parameters(block.module) for block in blocks], parameters(model))

    def max_rate(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the share of all parameters that goes if every cut removes as much as it can."""
        pools = Pools.of(model, blocks)
        return 1 - _after(_lefts(model, blocks, self._all), pools, LARGEST).total / pools.total

    def rates_of_parts(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> list[float]:
        """Returns the rates of the parts of the blocks as they are expected, before any cut is made."""
        if self.parts is None:
            return []
        pools, target = Pools.of(model, blocks), self._target(model, blocks, rates)
        lefts = _lefts(model, blocks, self._all)
        amount, share_at = _amount(lefts, pools, target), self.parts.method.share_at(model, blocks)
        return self.parts.rates(model, blocks, rates=rates, target=pools.total - pools.blocks * share_at(amount))

    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        device: torch.device,
        stream: Callable[[], Stream],
    ) -> list[float]:
        """Makes the cuts one after the other, in place, and returns the share that each block has lost.

        Args:
            model: The causal LM, in eval mode.
            blocks: Its blocks.
            rates: The share of its size that each block is to lose.
            device: Device on which a block computes.
            stream: Returns a stream of the calibration batches that begins at the first block's input.
        """
        target, sizes = self._target(model, blocks, rates), self.sizes(model, blocks)
        path, first = blocks[0].path.rpartition(".")[0], stream()
        present, kept, start = list(blocks), list(range(len(blocks))), first.copy
        for index, stage in enumerate(self._all):
            own = [rates[block] for block in kept]
            if isinstance(stage, PartsStage):
                planned = stage.rates(model, present, rates=own, target=target)
            else:
                lefts = _lefts(model, present, self._all[index:])
                amount = _amount(lefts, Pools.of(model, present), target)
                least = None if len(lefts) == 1 else target
                planned = stage.rates(model, present, rates=own, amount=amount, least=least)
            unread = [BlockStatistics()] * len(present)
            lost = stage.method.apply(model, present, rates=planned, statistics=unread, device=device, stream=start)
            if isinstance(stage, WholeStage):
                kept = [block for block, share in zip(kept, lost, strict=True) if share < 1]
                present = find_blocks(model, blocks=path)
                start = first.restarted(model, present).copy
        left = dict(zip(kept, (parameters(block.module) for block in present), strict=True))
        after = _with_others([left.get(block, 0) for block in range(len(blocks))], parameters(model))
        return [1 - now / before for now, before in zip(after, sizes, strict=True)]

    def _target(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> float:
        """Returns the number of parameters that ``rates`` leave."""
        return sum((1 - rate) * size for rate, size in zip(rates, self.sizes(model, blocks), strict=True))


def _lefts(model: PreTrainedModel, blocks: Sequence[Block], stages: Sequence[Stage]) -> list[Left]:
    return [stage.left(model, blocks) for stage in stages]


def _after(lefts: Sequence[Left], pools: Pools, amount: float) -> Pools:
    """Returns what is left of ``pools`` after all cuts."""
    for left in lefts:
        pools = left(pools, amount)
    return pools


def _amount(lefts: Sequence[Left], pools: Pools, target: float) -> float:
    """Returns the amount at which all cuts leave ``target`` parameters, by bisection."""
    below, above = 0.0, 1.0
    while _after(lefts, pools, above).total > target and above < LARGEST:
        above *= 2
    for _ in range(BISECTIONS):
        middle = (below + above) / 2
        if _after(lefts, pools, middle).total > target:
            below = middle
        else:
            above = middle
    return above


def _with_others(in_blocks: Sequence[int], total: int) -> list[int]:
    """Returns the parameters of the blocks, each with an equal part of the others; [4, 2] of 9 become [6, 3]."""
    each, rest = divmod(total - sum(in_blocks), len(in_blocks))
    return [number + each + (index < rest) for index, number in enumerate(in_blocks)]
