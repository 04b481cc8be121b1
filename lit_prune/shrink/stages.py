"""Cuts of a whole model before those of the parts of its blocks, which together leave one number of parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from lit_prune.allocate.base import bisect, meet_budget, weighted_mean
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.families import Block, find_blocks
from lit_prune.progress import log
from lit_prune.pruning.base import Method

LARGEST_AMOUNT = 1e9  # at which every cut removes as much as it can


class Counts(NamedTuple):
    """Numbers of parameters of a model: of its blocks and of all else."""

    blocks: float
    others: float

    @property
    def total(self) -> float:
        """All parameters."""
        return self.blocks + self.others

    def without(self, coverage: tuple[float, float], share: float) -> Counts:
        """Returns what remains where ``share`` goes of what a cut covers: shares of the blocks and of all else."""
        return Counts(*(count * (1 - covered * share) for count, covered in zip(self, coverage, strict=True)))

    @classmethod
    def of(cls, model: PreTrainedModel, blocks: Sequence[Block]) -> Counts:
        """Returns those of ``model``, tied weights counted once."""
        in_blocks = sum(parameters(block.module) for block in blocks)
        return cls(in_blocks, parameters(model) - in_blocks)


Remainder = Callable[[Counts, float], Counts]
"""A function of what a cut starts from, and of an amount, that gives what remains.

The cut removes the amount times its weight, or as much as it can.
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

    def remainder(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Remainder:
        """Returns what remains after the cut, by the amount."""
        current, most = self._bounds(model, blocks)
        coverage, largest = self.method.coverage(model, blocks), (most - current) / (1 - current)
        return lambda counts, amount: counts.without(coverage, min(amount * self.weight, largest))

    def planned(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        counts: Counts,
        target: float,
        later: Sequence[Remainder],
    ) -> tuple[list[float], Counts]:
        """Returns the rates that the method supports, and what remains after them.

        They are nearest to what all cuts need, as far as later ones can meet the target: no more goes than is asked
        for, and what remains is no more than later cuts can remove. The last cut is rounded to the nearest.

        Args:
            model: The model.
            blocks: Its blocks.
            rates: Their rates by the allocation, which may tell what goes first.
            counts: What the cuts before leave.
            target: Number of parameters that all cuts together are to leave.
            later: What remains after each of the later cuts.
        """
        current, most = self._bounds(model, blocks)
        amount = amount_for([self.remainder(model, blocks), *later], counts, target)
        wanted = min(current + (1 - current) * amount * self.weight, most)
        step, mean, sizes = self._step(model, blocks), sum(rates) / len(rates), self.method.sizes(model, blocks)
        best, smallest = (list(rates), counts), math.inf
        for steps in range(2 * math.ceil(1 / step)):
            share = wanted + step * ((steps + 1) // 2) * (-1 if steps % 2 else 1)  # nearer ones first
            if steps and not current - step < share < most + step:
                continue
            share = min(max(share, current), most)
            supported = self.method.rates([share + rate - mean for rate in rates], sizes)
            remaining = self._remaining(model, blocks, counts, supported)
            miss = 0.0
            if later:
                least = remains(later, remaining, LARGEST_AMOUNT).total
                miss = max(least - target, target - remaining.total, 0.0)
            if miss < smallest:
                best, smallest = (supported, remaining), miss
            if smallest < 1:
                break
        return best

    def _remaining(
        self, model: PreTrainedModel, blocks: Sequence[Block], counts: Counts, rates: Sequence[float]
    ) -> Counts:
        """Returns what remains of ``counts`` after the cut; of blocks that differ, the largest go if none are named."""
        current, coverage = self._bounds(model, blocks)[0], self.method.coverage(model, blocks)
        share = (sum(rates) / len(rates) - current) / (1 - current)
        sizes = [parameters(block.module) for block in blocks]
        if coverage != (1.0, 0.0) or len(set(sizes)) == 1:
            return counts.without(coverage, share)
        named = [size for size, rate in zip(sizes, rates, strict=True) if rate == 1]
        largest = sorted(sizes, reverse=True)[: round(share * len(sizes))]
        return counts.without(coverage, sum(named or largest) / sum(sizes))

    def _bounds(self, model: PreTrainedModel, blocks: Sequence[Block]) -> tuple[float, float]:
        """Returns the rate of earlier cuts and the largest rate."""
        current = self.method.current_rates(model, blocks)[0]
        most = min(self.method.max_rate(model, blocks), self.method.max_sparsity(model, blocks))
        return current, max(most, current)

    def _step(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the distance of two rates."""
        return 2 * self.method.rounding(model, blocks)


class PartsMethod(Method):
    """A method that makes several parts of every block smaller, by rates of the blocks."""

    @abstractmethod
    def share_at(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Callable[[float], float]:
        """Returns the function of an amount that gives the share of all blocks' parameters that goes with it.

        Every part loses the amount times its weight, of what it has now, or as much as it can.
        """


@dataclass(frozen=True)
class PartsStage:
    """The cut of the parts of the blocks, which makes up for the rounding of the cuts before.

    Args:
        method: The method.
    """

    method: PartsMethod

    def remainder(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Remainder:
        """Returns what remains after the cut, by the amount."""
        share_at = self.method.share_at(model, blocks)
        return lambda counts, amount: counts.without((1.0, 0.0), share_at(amount))

    def planned(
        self, model: PreTrainedModel, blocks: Sequence[Block], *, rates: Sequence[float], target: float
    ) -> list[float]:
        """Returns rates that leave ``target`` parameters, or as nearly as can be, apart like those of the allocation.

        Args:
            model: The model, as the cuts before have left it.
            blocks: Its blocks.
            rates: Their rates by the allocation, of what the blocks have now.
            target: Number of parameters to leave.
        """
        removable, current = self.method.removable(model, blocks), self.method.current_rates(model, blocks)
        if not sum(removable):
            return current
        most = self.method.max_rate(model, blocks)
        least_mean, most_mean = (
            weighted_mean(bound, removable) for bound in (current, [max(most, rate) for rate in current])
        )
        mean = least_mean + (parameters(model) - target) / sum(removable)
        return meet_budget(
            lambda amount: [now + (1 - now) * (rate + amount) for now, rate in zip(current, rates, strict=True)],
            min(max(mean, least_mean), most_mean),
            sizes=removable,
            lower=current,
            upper=most,
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

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        """Returns the size of each block of the model as it is; their sum is the number of its parameters."""
        return _with_others([parameters(block.module) for block in blocks], parameters(model))

    def max_share(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns the share of all parameters that goes if every cut removes as much as it can."""
        counts = Counts.of(model, blocks)
        return 1 - remains(self._remainders(model, blocks), counts, LARGEST_AMOUNT).total / counts.total

    def half_step(self, model: PreTrainedModel, blocks: Sequence[Block]) -> float:
        """Returns half of the finest step in which the parameters of the model can go, as a share of all of them."""
        counts = Counts.of(model, blocks)
        if self.parts is None:
            last = self.whole[-1].method
            half = last.rounding(model, blocks) / (1 - last.current_rates(model, blocks)[0])  # of what there is now
            return 1 - counts.without(last.coverage(model, blocks), half).total / counts.total
        method = self.parts.method
        equal = [0.0] * len(blocks)
        return method.rounding_of_mean(model, blocks, equal) * sum(method.removable(model, blocks)) / counts.total

    def sizes_in_config(
        self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]
    ) -> dict[str, int]:
        """Returns the fields of the config that all cuts together change, for equal rates, without making them."""
        target, counts, fields = self._target(model, blocks, rates), Counts.of(model, blocks), dict[str, int]()
        before, remainders = counts, self._remainders(model, blocks)
        for index, stage in enumerate(self.whole):
            later = remainders[index + 1 :]
            planned, counts = stage.planned(model, blocks, rates=rates, counts=counts, target=target, later=later)
            fields |= stage.method.sizes_in_config(model, blocks, planned)
        if self.parts is not None and counts.blocks:
            share = (counts.total - target) / counts.blocks  # of the blocks as they then are
            planned = self.parts.planned(model, blocks, rates=rates, target=before.total - share * before.blocks)
            fields |= self.parts.method.sizes_in_config(model, blocks, planned)
        return fields

    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        device: torch.device,
        stream: Callable[[], Stream],
    ) -> list[float]:
        """Makes the cuts one after the other, in place, and returns the share that each block has lost of its size.

        Args:
            model: The causal LM, in eval mode.
            blocks: Its blocks.
            rates: The share of its size that each block is to lose.
            device: Device on which a block computes.
            stream: Returns a stream of the calibration batches that begins at the first block's input.
        """
        target, sizes = self._target(model, blocks, rates), self.sizes(model, blocks)
        kept, path, start = list(blocks), blocks[0].path_of_list, stream()
        numbers = list(range(len(blocks)))  # of the blocks that are kept, in the model as it was

        def cut(method: Method, planned: Sequence[float]) -> list[float]:
            none = [BlockStatistics()] * len(kept)
            return method.apply(model, kept, rates=planned, statistics=none, device=device, stream=start.copy)

        for index, stage in enumerate(self.whole):
            planned, _ = stage.planned(
                model,
                kept,
                rates=[rates[number] for number in numbers],
                counts=Counts.of(model, kept),
                target=target,
                later=self._remainders(model, kept)[index + 1 :],
            )
            if not stage.method.removes(model, kept, planned):
                tell_it_stays(type(stage.method).__name__)
            lost = cut(stage.method, planned)
            numbers = [number for number, share in zip(numbers, lost, strict=True) if share < 1]
            kept = find_blocks(model, blocks=path)
            start = start.restarted(model, kept)
        if self.parts is not None:
            cut(
                self.parts.method,
                self.parts.planned(model, kept, rates=[rates[number] for number in numbers], target=target),
            )
        left = dict(zip(numbers, (parameters(block.module) for block in kept), strict=True))
        after = _with_others([left.get(number, 0) for number in range(len(blocks))], parameters(model))
        return [1 - now / before for now, before in zip(after, sizes, strict=True)]

    def _target(self, model: PreTrainedModel, blocks: Sequence[Block], rates: Sequence[float]) -> float:
        """Returns the number of parameters that ``rates`` leave."""
        return sum((1 - rate) * size for rate, size in zip(rates, self.sizes(model, blocks), strict=True))

    def _remainders(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[Remainder]:
        found = [stage.remainder(model, blocks) for stage in self.whole]
        return found if self.parts is None else [*found, self.parts.remainder(model, blocks)]


def tell_it_stays(name: str) -> None:
    """Logs that a part loses nothing, while others do."""
    log(f"{name} removes nothing: its share is less than half of its smallest step. The other parts make up for it.")


def remains(remainders: Sequence[Remainder], counts: Counts, amount: float) -> Counts:
    """Returns what remains of ``counts`` after all cuts."""
    for remainder in remainders:
        counts = remainder(counts, amount)
    return counts


def amount_for(remainders: Sequence[Remainder], counts: Counts, target: float) -> float:
    """Returns the amount at which all cuts leave ``target`` parameters, or as few as they can."""
    fewest = remains(remainders, counts, LARGEST_AMOUNT).total
    return bisect(lambda amount: -remains(remainders, counts, amount).total, -max(target, fewest))


def _with_others(in_blocks: Sequence[int], total: int) -> list[int]:
    """Returns the parameters of the blocks, each with an equal part of the others; [4, 2] of 9 become [6, 3]."""
    each, rest = divmod(total - sum(in_blocks), len(in_blocks))
    return [number + each + (index < rest) for index, number in enumerate(in_blocks)]
