"""Plan: rates from a YAML file, written by `lit-prune score` or by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import yaml
from torch import Tensor

from lit_prune.allocate.base import Allocation, Level, mean_rate, weighted_mean
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError

MEAN_TOLERANCE = 1e-4
RATE = "rate"


@final
@dataclass(frozen=True)
class Plan(Allocation):
    """The rates in a YAML file that maps each block's index to its rate, for instance ``0: 0.41``.

    A block may have a rate for each of its linears, whose mean, weighted by their sizes, must be the block's rate:
    ``0: {rate: 0.41, self_attn.q_proj: 0.5, ...}``. With Shrink, these are rates of its parts:
    ``0: {rate: 0.41, MLPWidth: 0.5, HeadGroups: 0.0}``.

    Args:
        path: The file.

    Raises:
        InputError: if the file does not exist or is not such a mapping, has a block, a linear or a part that the model
            does not have, lacks one that it has, or if a mean of the rates is not as it must be.
    """

    path: str

    def __post_init__(self) -> None:
        self._entries()

    def rates(self) -> dict[int, float]:
        """Returns the rate of each block, as in the file."""
        return {block: entry[RATE] for block, entry in self._entries().items()}

    @property
    def levels(self) -> frozenset[Level]:  # type: ignore[override]
        """What the rates are of: the blocks, or linears or parts, which the names alone do not tell apart."""
        return frozenset({"linears", "parts"} if self._has_names else {"blocks"})

    @property
    def _has_names(self) -> bool:
        return any(len(entry) > 1 for entry in self._entries().values())

    def named_rates(self, sizes: Sequence[Mapping[str, int]]) -> list[dict[str, float]] | None:
        """Returns the planned rates of each block's linears or parts; None if none are planned.

        Raises:
            InputError: if they are not those of the block, or their mean is not the block's rate.
        """
        if not self._has_names:
            return None
        entries = self._entries()
        return [self._named(block, entries[block], own_sizes) for block, own_sizes in enumerate(sizes)]

    def _named(self, block: int, entry: dict[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
        rate = entry[RATE]
        planned = {name: value for name, value in entry.items() if name != RATE} or dict.fromkeys(sizes, rate)
        if differing := sorted(planned.keys() ^ sizes.keys()):
            raise InputError(
                f"`Plan.path`: block {block} in {self.path} must have rates of all that is pruned in it, "
                f"{', '.join(sizes)}; {differing[0]} is {'not one' if differing[0] in planned else 'missing'}."
            )
        mean = mean_rate(planned, sizes)
        if abs(mean - rate) > MEAN_TOLERANCE:
            raise InputError(
                f"`Plan.path`: the rate of block {block} in {self.path} must be the mean of the rates below it, "
                f"{mean:.6g}, got {rate:g}."
            )
        return {name: planned[name] for name in sizes}

    def _entries(self) -> dict[int, dict[str, float]]:
        """Returns the rate of each block under RATE, and those of its linears or parts under their names."""
        if not Path(self.path).is_file():
            raise InputError(f"`Plan.path` must be a file, got {self.path}; `lit-prune score` writes one.")
        try:
            content = yaml.safe_load(Path(self.path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"`Plan.path` must be YAML, {self.path} is not: {str(error).splitlines()[0]}.") from error
        if not isinstance(content, dict) or not content:
            raise InputError(f"`Plan.path` must map blocks to rates, as in `0: 0.41`; {self.path} does not.")
        return {block: self._entry(block, entry) for block, entry in content.items()}

    def _entry(self, block: Any, entry: Any) -> dict[str, float]:
        if not isinstance(block, int) or isinstance(block, bool):
            raise InputError(f"`Plan.path`: blocks must be whole numbers, got {block!r} in {self.path}.")
        by_name = entry if isinstance(entry, dict) else {RATE: entry}
        for name, rate in by_name.items():
            if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate <= 1:
                where = f"block {block}" if name == RATE else f"{name} of block {block}"
                raise InputError(f"`Plan.path`: the rate of {where} must be in [0, 1], got {rate!r} in {self.path}.")
        if RATE not in by_name:
            raise InputError(
                f"`Plan.path`: block {block} in {self.path} must have a `{RATE}`, the mean of the rates below it."
            )
        return {str(name): float(rate) for name, rate in by_name.items()}

    def is_uniform(self) -> bool:
        """Returns whether the planned rates are all the same."""
        return not self._has_names and len(set(self.rates().values())) == 1

    def check(self, sizes: Sequence[int], sparsity: float, lower: Sequence[float], upper: float) -> None:
        """Raises InputError if the blocks are not the model's, a rate is out of bounds, or the mean is off."""
        planned, blocks = self.rates(), len(sizes)
        if unknown_blocks := sorted(set(planned) - set(range(blocks))):
            raise InputError(
                f"`Plan.path`: the model has blocks 0 to {blocks - 1}, {self.path} names {unknown_blocks[0]}."
            )
        if missing := sorted(set(range(blocks)) - set(planned)):
            raise InputError(f"`Plan.path`: every block must have a rate, {self.path} has none for block {missing[0]}.")
        for block, low in enumerate(lower):
            if not low - MEAN_TOLERANCE <= planned[block] <= max(upper, low) + MEAN_TOLERANCE:
                raise InputError(
                    f"`Plan.path`: the rate of block {block} must be between {low:.4g} (`pruning.min_rate` or its "
                    f"current sparsity) and {upper:.4g} (`pruning.max_rate`), got {planned[block]:g} in {self.path}."
                )
        mean = weighted_mean([planned[block] for block in range(blocks)], sizes)
        if abs(mean - sparsity) > MEAN_TOLERANCE:
            raise InputError(
                f"`Plan.path`: the mean of the rates in {self.path} must be the mean sparsity of "
                f"the blocks, {sparsity:.6g}, got {mean:.6g}. Edit the plan, or pass "
                f"`--pruning.sparsity {mean:.6g} --pruning.budget linears`, without a `pruning.target_parameters` or "
                "`pruning.target_bytes`."
            )

    def planned_rates(self, blocks: int) -> list[float] | None:
        """Returns the planned rates; None if they are not those of so many blocks."""
        planned = self.rates()
        return [planned[block] for block in range(blocks)] if planned.keys() == set(range(blocks)) else None

    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        """Returns 1: a plan needs no scores."""
        return 1.0

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns the planned rates in the order of the blocks."""
        planned = self.rates()
        return [planned[block] for block in range(len(scores))]


def write_plan(
    path: str | os.PathLike[str],
    rates: Sequence[float],
    scores: Sequence[float],
    header: str,
    named: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """Writes a plan file for :class:`Plan`, with each block's score as a comment beside its rate.

    Args:
        path: The file.
        rates: Rate of each block.
        scores: Score of each block.
        header: Text of the comment at the top.
        named: Rates of each block's linears or parts by name, if they are planned one by one.
    """
    lines = [f"# {line}" for line in header.splitlines()]
    for block, (rate, score) in enumerate(zip(rates, scores, strict=True)):
        if named is None:
            lines.append(f"{block}: {rate:.6f}  # score {score:.6g}")
        else:
            lines += [f"{block}:", f"  {RATE}: {rate:.6f}  # score {score:.6g}"]
            lines += [f"  {name}: {value:.6f}" for name, value in named[block].items()]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
