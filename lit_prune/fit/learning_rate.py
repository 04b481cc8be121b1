"""The learning-rate schedule, a linear warm-up followed by a cosine, which restarts at every cut."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

MAX_WARM_UP, STEPS_PER_WARM_UP_STEP = 10, 10  # the default warm-up: a tenth of the steps, at most ten


def warm_up_steps(until_cut: float) -> int:
    """Returns the default number of warm-up steps, with ``until_cut`` steps until the next cut or the end.

    Ten, but at most a tenth of them, so that a short training is not all warm-up: 10 of 100 or 5000, 2 of 20, 1 of 8.
    """
    return max(1, int(min(MAX_WARM_UP, until_cut / STEPS_PER_WARM_UP_STEP)))


def share_of_peak(step: int, *, warmup: int, steps: float, least: float) -> float:
    """Returns the learning rate of a step, as a share of the peak.

    (t + 1) / w in the warm-up, which ends at the peak; then l + (1 - l) * (1 + cos(pi * p)) / 2, p = (t + 1 - w) /
    (n - w), which the last step ends at l. Of four steps with w = 2, l = 0.1: 0.5, 1, 0.55, 0.1.

    Args:
        step: t, from 0.
        warmup: w, the number of warm-up steps; with 0 or 1, step 0 has the peak rate.
        steps: n, the number of steps until the end of the training; infinity keeps the peak after the warm-up.
        least: l, the rate of the last step, as a share of the peak; with 0 that step changes nothing.
    """
    done, warmup = step + 1, max(1, warmup)
    if done <= warmup:
        return done / warmup
    progress = min(1.0, (done - warmup) / max(1, steps - warmup))
    return least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2


def warm_up_and_cosine(optimizer: Optimizer, *, warmup: int, steps: float, least: float) -> LambdaLR:
    """Returns the schedule of :func:`share_of_peak` for ``optimizer``, whose learning rate is the peak."""
    return LambdaLR(optimizer, lambda step: share_of_peak(step, warmup=warmup, steps=steps, least=least))
