"""Plan: rates from a YAML file, written by `lit-prune score` or by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import yaml
from torch import Tensor

from lit_prune.allocate.base import Allocation, weighted_mean
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError

MEAN_TOLERANCE = 1e-4


@final
@dataclass(frozen=True)
class Plan(Allocation):
    """The rates in a YAML file that maps each block's index to its rate, for instance ``0: 0.41``.

    Args:
        path: The file.

    Raises:
        InputError: if the file does not exist or is not such a mapping, has a block that the model does not have, lacks
            one that it has, or if the mean of the rates differs from the sparsity.
    """

    path: str

    def __post_init__(self) -> None:
        self.rates()

    def rates(self) -> dict[int, float]:
        """Returns the rate of each block, as in the file."""
        if not Path(self.path).is_file():
            raise InputError(f"`Plan.path` must be a file, got {self.path}; `lit-prune score` writes one.")
        try:
            content = yaml.safe_load(Path(self.path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"`Plan.path` must be YAML, {self.path} is not: {str(error).splitlines()[0]}.") from error
        if not isinstance(content, dict) or not content:
            raise InputError(f"`Plan.path` must map blocks to rates, as in `0: 0.41`; {self.path} does not.")
        for block, rate in content.items():
            if not isinstance(block, int) or isinstance(block, bool):
                raise InputError(f"`Plan.path`: blocks must be whole numbers, got {block!r} in {self.path}.")
            if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate <= 1:
                raise InputError(
                    f"`Plan.path`: the rate of block {block} must be in [0, 1], got {rate!r} in {self.path}."
                )
        return {block: float(rate) for block, rate in content.items()}

    def is_uniform(self) -> bool:
        """Returns whether the planned rates are all the same."""
        return len(set(self.rates().values())) == 1

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
                f"`--pruning.sparsity {mean:.6g} --pruning.budget linears`."
            )

    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        """Returns 1: a plan needs no scores."""
        return 1.0

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns the planned rates in the order of the blocks."""
        planned = self.rates()
        return [planned[block] for block in range(len(scores))]


def write_plan(path: str | os.PathLike[str], rates: Sequence[float], scores: Sequence[float], header: str) -> None:
    """Writes a plan file for :class:`Plan`, with each block's score as a comment beside its rate."""
    lines = [f"# {line}" for line in header.splitlines()]
    lines += [
        f"{block}: {rate:.6f}  # score {score:.6g}"
        for block, (rate, score) in enumerate(zip(rates, scores, strict=True))
    ]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
