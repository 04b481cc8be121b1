"""Schedules of sparsity: the steps at which the model is cut, and the sparsity after each cut.

A single cut goes to the final sparsity at once. For several cuts a schedule gives the share of the final sparsity that
each of them reaches, unless their targets are listed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, final

from lit_prune.errors import InputError


class Cut(NamedTuple):
    """One cut: the optimizer step that it precedes, and the sparsity after it."""

    step: int
    sparsity: float


class Schedule(ABC):
    """The rise of the sparsity over several cuts."""

    @abstractmethod
    def share(self, progress: float) -> float:
        """Returns the share of the final sparsity that is reached at ``progress``: non-decreasing, and 1 at 1.

        Args:
            progress: The position in the series of cuts: 0 before the first cut, 1 at the last.
        """


@final
@dataclass(frozen=True)
class OneShot(Schedule):
    """The whole sparsity in a single cut."""

    def share(self, progress: float) -> float:
        """Returns 1."""
        return 1.0


@final
@dataclass(frozen=True)
class Linear(Schedule):
    """Equal steps: s_t = s_f * p; three cuts to 0.6 reach 0.2, 0.4 and 0.6."""

    def share(self, progress: float) -> float:
        """Returns ``progress``."""
        return progress


@final
@dataclass(frozen=True)
class Cubic(Schedule):
    """Large steps first, while many weights matter little, and small ones last: s_t = s_f * (1 - (1 - p)^3).

    *To prune, or not to prune*, 2017, arXiv 1710.01878, equation 1, with s_i = 0. Three cuts to 0.6 reach 0.6 * 19/27,
    0.6 * 26/27 and 0.6: 0.4222, 0.5778 and 0.6.
    """

    def share(self, progress: float) -> float:
        """Returns 1 - (1 - p)^3."""
        return 1 - (1 - progress) ** 3


def shares(at_step: int | Sequence[int], schedule: Schedule | None = None) -> tuple[Cut, ...]:
    """Returns the cuts in order, each with its share of a final sparsity that is not known yet, in place of a sparsity.

    Arguments and errors are those of :func:`cuts`; the share of the last cut is 1.
    """
    steps = [at_step] if isinstance(at_step, int) else list(at_step)
    _check_steps(steps)
    return tuple(Cut(step, share) for step, share in zip(steps, _shares(steps, schedule), strict=True))


def cuts(
    at_step: int | Sequence[int], sparsity: float | Sequence[float], schedule: Schedule | None = None
) -> tuple[Cut, ...]:
    """Returns the cuts in order; the target of the last is exactly the final sparsity.

    Args:
        at_step: The step of a single cut, or of each cut.
        sparsity: The final sparsity, or the target of each cut.
        schedule: The rise of the sparsity if ``sparsity`` is one number; None is OneShot for one cut and Cubic for
            several.

    Raises:
        InputError: if a step is negative or the steps do not rise; if a target is outside [0, 1) or the targets do not
            rise; if targets are listed together with a schedule, or in another number than steps; for OneShot with
            several cuts.
    """
    steps = [at_step] if isinstance(at_step, int) else list(at_step)
    _check_steps(steps)
    if not isinstance(sparsity, (int, float)):
        targets = list(sparsity)
        _check_listed(targets, steps, schedule)
    else:
        targets = [sparsity * share for share in _shares(steps, schedule)]
    _check_targets(targets)
    return tuple(Cut(step, target) for step, target in zip(steps, targets, strict=True))


def _shares(steps: Sequence[int], schedule: Schedule | None) -> list[float]:
    """Returns the share of the final sparsity that each cut reaches; that of the last is exactly 1."""
    if len(steps) == 1:
        return [1.0]
    chosen = schedule or Cubic()
    if isinstance(chosen, OneShot):
        raise InputError(
            f"`pruning.schedule` must be Linear or Cubic for {len(steps)} cuts, got OneShot, which makes one. "
            "Give one `pruning.at_step`, or another schedule."
        )
    return [*(chosen.share(position) for position in progress(steps)[:-1]), 1.0]


def progress(steps: Sequence[int]) -> list[float]:
    """Returns the position of each step in [0, 1], on a ramp that starts one mean interval before the first step.

    The first cut is therefore not at 0, where it would remove nothing: [100, 200, 300] are at 1/3, 2/3 and 1.
    """
    begin = steps[0] - (steps[-1] - steps[0]) / (len(steps) - 1)
    return [(step - begin) / (steps[-1] - begin) for step in steps]


def _check_steps(steps: Sequence[int]) -> None:
    if not steps:
        raise InputError("`pruning.at_step` must be a step, or a list of at least one, got an empty list.")
    if steps[0] < 0:
        raise InputError(f"`pruning.at_step` must be at least 0, got {steps[0]}.")
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise InputError(f"`pruning.at_step` must list rising steps, got {list(steps)}.")


def _check_listed(targets: Sequence[float], steps: Sequence[int], schedule: Schedule | None) -> None:
    if len(targets) != len(steps):
        raise InputError(
            f"`pruning.sparsity` must be one number, or one for each of the {len(steps)} steps of `pruning.at_step`, "
            f"got {len(targets)}."
        )
    if schedule is not None:
        raise InputError(
            f"`pruning.schedule` must be null if `pruning.sparsity` lists the target of every cut, got {schedule}. "
            "Give only the final sparsity, or no schedule."
        )


def _check_targets(targets: Sequence[float]) -> None:
    for target in targets:
        if not 0 <= target < 1:
            raise InputError(f"`pruning.sparsity` must be in [0, 1), the share to remove, got {target}.")
    if any(later <= earlier for earlier, later in pairwise(targets)):
        shown = ", ".join(f"{target:g}" for target in targets)
        raise InputError(
            f"`pruning.sparsity` must rise from cut to cut, since pruned weights stay pruned, got {shown}."
        )
