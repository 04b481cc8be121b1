"""Sparsity as a function of the step: when cuts come, and how much is gone after each.

One cut takes all that is asked for. Of several, a schedule says what share of the final sparsity each one reaches,
or the targets are listed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, final

from lit_prune.errors import InputError


class Cut(NamedTuple):
    """One cut: the optimizer step before which it comes, and the share that is gone after it."""

    step: int
    sparsity: float


class Schedule(ABC):
    """How sparsity rises over several cuts."""

    @abstractmethod
    def share(self, progress: float) -> float:
        """Returns the share of the final sparsity that is reached at ``progress``, 0 before the first cut, 1 at the
        last; it never falls, and is 1 at 1."""


@final
@dataclass(frozen=True)
class OneShot(Schedule):
    """All at once: for one cut."""

    def share(self, progress: float) -> float:
        """Returns 1."""
        return 1.0


@final
@dataclass(frozen=True)
class Linear(Schedule):
    """Equal shares: s_t = s_f * p; three cuts to 0.6 reach 0.2, 0.4 and 0.6."""

    def share(self, progress: float) -> float:
        """Returns the progress."""
        return progress


@final
@dataclass(frozen=True)
class Cubic(Schedule):
    """Most at first, while there is much to choose from: s_t = s_f * (1 - (1 - p)^3).

    *To prune, or not to prune*, 2017, arXiv 1710.01878, equation 1, with s_i = 0. Three cuts to 0.6 reach 0.6 * 19/27,
    0.6 * 26/27 and 0.6: 0.4222, 0.5778 and 0.6.
    """

    def share(self, progress: float) -> float:
        """Returns 1 - (1 - p)^3."""
        return 1 - (1 - progress) ** 3


def cuts(
    at_step: int | Sequence[int], sparsity: float | Sequence[float], schedule: Schedule | None = None
) -> tuple[Cut, ...]:
    """Returns every cut in order; the last target is the final sparsity, exactly.

    Args:
        at_step: The step of the one cut, or of each.
        sparsity: The final sparsity, or the target of each cut.
        schedule: What lies between, where ``sparsity`` does not list it; None is OneShot for one cut and Cubic for
            several.

    Raises:
        InputError: for steps that do not rise from 0, targets that do not rise within [0, 1), a list of targets of
            another length or beside a schedule, and OneShot for several cuts.
    """
    steps = [at_step] if isinstance(at_step, int) else list(at_step)
    _check_steps(steps)
    if not isinstance(sparsity, (int, float)):
        targets = list(sparsity)
        _check_listed(targets, steps, schedule)
    elif len(steps) == 1:
        targets = [sparsity]
    else:
        chosen = schedule or Cubic()
        if isinstance(chosen, OneShot):
            raise InputError(
                f"`pruning.schedule` must be Linear or Cubic for {len(steps)} cuts, got OneShot: it makes one. Give "
                "one `pruning.at_step`, or another schedule."
            )
        targets = [sparsity * chosen.share(part) for part in progress(steps)]
        targets[-1] = sparsity
    _check_targets(targets)
    return tuple(Cut(step, target) for step, target in zip(steps, targets, strict=True))


def progress(steps: Sequence[int]) -> list[float]:
    """Returns how far each of several steps is along a ramp that began one mean interval before the first.

    So the first cut takes something: steps [100, 200, 300] are at 1/3, 2/3 and 1.
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
            f"`pruning.sparsity` must be one number, or as many as `pruning.at_step` has steps, {len(steps)}, got "
            f"{len(targets)}."
        )
    if schedule is not None:
        raise InputError(
            f"`pruning.schedule` must be null where `pruning.sparsity` lists every target, got {schedule}; give the "
            "final sparsity alone, or no schedule."
        )


def _check_targets(targets: Sequence[float]) -> None:
    for target in targets:
        if not 0 <= target < 1:
            raise InputError(f"`pruning.sparsity` must be in [0, 1), the share to remove, got {target}.")
    if any(later <= earlier for earlier, later in pairwise(targets)):
        shown = ", ".join(f"{target:g}" for target in targets)
        raise InputError(f"`pruning.sparsity` must rise from cut to cut, what is pruned stays pruned, got {shown}.")
