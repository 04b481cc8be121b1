"""A trial without a model, for searches."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from lit_prune.allocate import Search, Uniform
from lit_prune.allocate.base import Refined
from lit_prune.allocate.budget import Limits
from lit_prune.search.trial import Trials

BEST = [0.3, 0.7, 0.5, 0.6, 0.4, 0.5]
LIMITS = Limits([1000] * 6, [0.0] * 6, 0.99, 0.5)
KEY = {"weights": "a" * 64}


class Bowl:
    """A trial without a model: the loss is least, 0, at BEST."""

    granularity = [1] * 6

    def __init__(self, stop: int | None = None) -> None:
        self.tokens = [10, 20, 30, 40]
        self.seen: list[tuple[list[float], int]] = []
        self.stop = stop

    def reuse(self, windows: int) -> None:
        pass

    def loss(self, rates: Sequence[float], window: int) -> float:
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append((list(rates), window))
        return sum((1 + window / 4) * (rate - best) ** 2 for rate, best in zip(rates, BEST, strict=True))

    def divergence(self, rates: Sequence[float], window: int, tokens: int | None) -> float:
        return self.loss(rates, window)


def opened(trial: Any) -> Trials:
    return Trials(lambda _: nullcontext(trial))


def refine(trial: Bowl, key: dict[str, Any] = KEY, **settings: Any) -> Refined:
    search = Search(**({"start": Uniform(), "evaluations": 200} | settings))
    return search.refine([0.5] * 6, LIMITS, trials=opened(trial), key=key)
