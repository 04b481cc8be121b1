"""Arithmetic: ATP, Determining Layer-wise Sparsity for Large Language Models, ICML 2025, arXiv 2502.14770."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from lit_prune.allocate.base import Allocation, Refined, meet_budget, weighted_mean
from lit_prune.allocate.budget import Limits
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError
from lit_prune.progress import counted, log
from lit_prune.search.losses import MeasuredLosses
from lit_prune.search.trial import Trial, Trials

TOLERANCE = 1e-9


@final
@dataclass(frozen=True)
class Arithmetic(Allocation):
    """Prunes later blocks more, by rates in arithmetic progression.

    rate_b = sparsity + difference * (b - (L - 1) / 2) for the blocks b = 0 to L - 1 (equation 4). The errors of early
    blocks accumulate over all later ones. Three blocks at sparsity 0.5 and difference 0.1 have rates [0.4, 0.5, 0.6].

    Without a `difference`, `trials` of them are tried on calibration windows, and the one with the least loss is used.
    They are evenly spaced from 0 to 2 * min(sparsity, 1 - sparsity) / (L - 1), which keeps the rates within [0, 1].

    Args:
        difference: Difference between the rates of neighbouring blocks; null tries several.
        trials: Number of differences to try, 0 and the largest one included.
        windows: Number of calibration windows on which each is measured.
        seed: Seed of the choice of windows.
        state: File with all measurements, as that of Search; if it exists, they are not made again.

    Raises:
        InputError: for settings out of range, a difference with which rates leave [0, 1], or a state of another model,
            text or cut.
    """

    difference: float | None = None
    trials: int = 9
    windows: int = 2
    seed: int = 0
    state: str | None = field(default=None, repr=False)

    ranks_blocks = False

    def __post_init__(self) -> None:
        if self.difference is not None and not self.difference >= 0:
            raise InputError(f"`Arithmetic.difference` must be at least 0, or null, got {self.difference}.")
        for name, least in (("trials", 2), ("windows", 1)):
            if getattr(self, name) < least:
                raise InputError(f"`Arithmetic.{name}` must be at least {least}, got {getattr(self, name)}.")

    @property
    def searches(self) -> bool:  # type: ignore[override]
        """Whether differences are tried."""
        return self.difference is None

    def is_uniform(self) -> bool:
        """Returns whether the difference is 0."""
        return self.difference == 0

    def check(self, sizes: Sequence[int], sparsity: float, lower: Sequence[float], upper: float) -> None:
        """Raises InputError if the difference is too large, or if the state belongs to another model or cut."""
        most = largest_difference(sparsity, len(sizes))
        if self.difference is not None and self.difference > most + TOLERANCE:
            raise InputError(
                f"`Arithmetic.difference` must be at most {most:.4g} for {len(sizes)} blocks at a mean of "
                f"{sparsity:.4g}, so that the rates are in [0, 1], got {self.difference}."
            )
        self._measured().check_key(self._settings() | {"sizes": list(sizes)})

    def check_key(self, key: Mapping[str, Any]) -> None:
        """Raises InputError if the state belongs to another model, text or recipe."""
        self._measured().check_key(key)

    def score(self, weights: dict[str, Tensor], statistics: BlockStatistics) -> float:
        """Returns 1: the blocks' positions decide."""
        return 1.0

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        """Returns the arithmetic progression, or equal rates while no difference is chosen."""
        difference, middle = self.difference or 0.0, (len(scores) - 1) / 2
        return [sparsity + difference * (block - middle) for block in range(len(scores))]

    def refine(self, rates: Sequence[float], limits: Limits, *, trials: Trials, key: Mapping[str, Any]) -> Refined:
        """Returns the progression with the least loss."""
        with trials.open(None) as trial:
            return self._best(rates, limits, trial, key)

    def _best(self, rates: Sequence[float], limits: Limits, trial: Trial, key: Mapping[str, Any]) -> Refined:
        most = largest_difference(limits.target, len(rates))
        differences = [most * number / (self.trials - 1) for number in range(self.trials)]
        candidates = [progression(difference, limits, trial.granularity) for difference in differences]
        count = len(trial.tokens)
        windows = random.Random(self.seed).sample(range(count), min(self.windows, count))
        losses = self._losses(candidates, windows, trial, {**key, **self._settings(), "sizes": list(limits.sizes)})
        if not math.isfinite(least := min(losses)):
            raise InputError("`calibration`: the loss under all rates that Arithmetic tried is NaN or infinity.")
        best = losses.index(least)
        log(f"Arithmetic: of {self.trials} differences, {differences[best]:.4g} gives the least loss.")
        details = {
            "evaluations": len(candidates) * len(windows),
            "sweeps": 1,
            "windows": len(windows),
            "loss_start": losses[0],
            "loss_end": least,
        }
        return Refined(candidates[best], details)

    def _losses(
        self, candidates: Sequence[Sequence[float]], windows: Sequence[int], trial: Trial, key: dict[str, Any]
    ) -> list[float]:
        """Returns the loss of every candidate, and writes the measurements to the state even if interrupted."""
        measured, tokens = self._measured(), [trial.tokens[window] for window in windows]
        measured.check_key(key)
        losses: list[float] = []
        try:
            with counted(len(candidates) * len(windows), "Trying differences") as report:
                for number, rates in enumerate(candidates):
                    for position, window in enumerate(windows):
                        if ((number,), window) not in measured.losses:
                            measured.losses[(number,), window] = trial.loss(rates, window)
                        report(number * len(windows) + position + 1, "")
                    losses.append(weighted_mean([measured.losses[(number,), window] for window in windows], tokens))
        finally:
            measured.save(key, list(candidates[losses.index(min(losses)) if losses else 0]))
        return losses

    def _measured(self) -> MeasuredLosses:
        return MeasuredLosses(self.state, "Arithmetic.state")

    def _settings(self) -> dict[str, Any]:
        return {"trials": self.trials}


def largest_difference(sparsity: float, blocks: int) -> float:
    """Returns the largest difference with which all rates are in [0, 1]; 0.6 for 3 blocks at 0.6 gives 0.4."""
    return 2 * min(sparsity, 1 - sparsity) / (blocks - 1) if blocks > 1 else 0.0


def progression(difference: float, limits: Limits, granularity: Sequence[int]) -> list[float]:
    """Returns the rates of a difference within the limits, rounded to the granularity of every block."""
    raw_rates = Arithmetic(difference).raw_rates(limits.sizes, limits.effective_target)
    rates = meet_budget(
        lambda amount: [rate + amount for rate in raw_rates],
        limits.effective_target,
        sizes=limits.sizes,
        lower=limits.lower,
        upper=limits.upper,
    )
    return rounded(rates, limits.sizes, granularity)


def rounded(rates: Sequence[float], sizes: Sequence[int], granularity: Sequence[int]) -> list[float]:
    """Returns rates whose units are multiples of the granularity, with a total as close as possible.

    [0.24, 0.56] of sizes 10 and 10 with a granularity of 2 are 2.4 and 5.6 units, and become 2 and 6.
    """
    steps = [rate * size / unit for rate, size, unit in zip(rates, sizes, granularity, strict=True)]
    counts = [math.floor(step + TOLERANCE) for step in steps]
    missing = sum((step - count) * unit for step, count, unit in zip(steps, counts, granularity, strict=True))
    for block in sorted(range(len(rates)), key=lambda block: counts[block] - steps[block]):
        unit = granularity[block]
        if (
            steps[block] - counts[block] > TOLERANCE
            and unit < 2 * missing
            and (counts[block] + 1) * unit < sizes[block]
        ):
            counts[block] += 1
            missing -= unit
    return [count * unit / size for count, unit, size in zip(counts, granularity, sizes, strict=True)]
