"""Trials: the loss that a model would have if it were pruned at given rates.

Suffixes: T tokens of one window.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import negative_log_likelihood
from lit_prune.models.families import find_blocks
from lit_prune.search.divergence import appended, compared, divergence, recorded
from lit_prune.search.prefix import Prefix
from lit_prune.search.space import Group

_T = TypeVar("_T")
NamedRates = Sequence[Mapping[str, float]]  # of the linears or parts of each block, by name
STRETCHES = (4, 8)  # numbers of stretches of blocks, in which the linears or parts of one name change together


class Trial(ABC):
    """A model that can temporarily be pruned at any rates.

    Args:
        model: The causal LM, in eval mode, on one device.
        path: Dotted path of its blocks.
        batches: The calibration batches; every row with at least one predicted token is a window.

    Attributes:
        tokens: Number of tokens that each window predicts.
        granularity: For each block, the number of units (weights or dimensions) of which every change is a multiple.
    """

    granularity: Sequence[int]

    def __init__(self, model: PreTrainedModel, path: str, batches: Sequence[Batch]) -> None:
        self.model, self.path = model, path
        rows = [row for batch in batches for row in _rows(batch)]
        counts = [len(compared(ids_1T.shape[1], mask_1T, None)) for ids_1T, mask_1T in rows]
        self._rows = [row for row, count in zip(rows, counts, strict=True) if count]
        self.tokens = [count for count in counts if count]
        self._unpruned: dict[int, Tensor] = {}  # the last hidden states of windows, for the divergence
        self._prefix: Prefix | None = None

    def reuse(self, windows: int) -> None:
        """From now on keeps the outputs of all blocks for so many windows; see :class:`Prefix`."""
        self._prefix = Prefix([block.module for block in find_blocks(self.model, blocks=self.path)], windows)

    @abstractmethod
    def take(self, rates: Sequence[float]) -> None:
        """Gives the model the weights, or close to those, that a cut with one of ``rates`` per block would leave."""

    def take_unpruned(self) -> None:
        """Gives the model the weights that it had before the trial, with the zeros of earlier cuts."""
        self.take([0.0] * len(self.granularity))

    def settings(self, rates: Sequence[float]) -> Sequence[Hashable]:
        """Returns, for each block, what its weights depend on under ``rates``."""
        return list(rates)

    def by_name(self) -> NamedTrial:
        """Returns a trial of the same model with one rate per linear or part, if the method supports such rates."""
        raise NotImplementedError(f"{type(self).__name__} has one rate per block")

    def loss(self, rates: Sequence[float], window: int) -> float:
        """Returns the mean cross entropy of the next token over one window, in nats; infinity for NaN."""
        ids_1T, mask_1T, logits_1TV = self._run_at(rates, window)
        nll, tokens = negative_log_likelihood(logits_1TV, ids_1T, mask_1T)
        return _finite(float(nll) / tokens)

    @torch.no_grad()
    def divergence(self, rates: Sequence[float], window: int, tokens: int | None = None) -> float:
        """Returns the mean KL divergence from the unpruned model's predictions; infinity for NaN.

        It is that of up to ``tokens`` predictions in one window, evenly spread, or of all for None. The first call for
        a window runs the unpruned model too, and keeps its last hidden states.
        """
        if window not in self._unpruned:
            self.take_unpruned()
            with recorded(self.model) as inputs:
                self._run(window)
            self._unpruned[window] = inputs[0]
        ids_1T, mask_1T = self._rows[window]
        with appended(self.model, self._unpruned[window], compared(ids_1T.shape[1], mask_1T, tokens)):
            logits_SV, reference_SV = self._run_at(rates, window)[2]
        return _finite(float(divergence(reference_SV, logits_SV)))

    def _run_at(self, rates: Sequence[float], window: int) -> tuple[Tensor, Tensor | None, Tensor]:
        self.take(rates)
        with self._prefix.reused(window, self.settings(rates)) if self._prefix else nullcontext():
            return self._run(window)

    @torch.no_grad()
    def _run(self, window: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns the token ids, the attention mask and the logits of one window."""
        ids_1T, mask_1T = self._rows[window]
        ids_1T = ids_1T.to(self.model.device)
        mask_1T = None if mask_1T is None else mask_1T.to(self.model.device)
        return ids_1T, mask_1T, self.model(input_ids=ids_1T, attention_mask=mask_1T, use_cache=False).logits


@dataclass(frozen=True)
class Trials:
    """The trials of a model from which a search chooses.

    Attributes:
        open: Gives the trial in which the weights at some rates of the linears or parts, and close to these, are those
            of a cut; for None at the rates of the blocks.
        start: The rates of linears or parts of a plan, from which the search starts; None for those of the blocks.
        mixtures: Several rates of parts from which it can start instead, by name.
    """

    open: Callable[[NamedRates | None], AbstractContextManager[Trial]]
    start: NamedRates | None = None
    mixtures: Mapping[str, NamedRates] = field(default_factory=dict)


class NamedTrial(Trial):
    """A trial with one rate per linear, or per part of `Shrink`, in the order of the blocks and within each.

    Attributes:
        names: The names of the linears or parts of each block.
        sizes: Size of each linear or part: its weights, or its parameters.
        tolerance: How far the sum of what is removed may be from the budget, in units of ``sizes``, because the
            granularities have no small common multiple.
    """

    names: Sequence[Sequence[str]]
    sizes: Sequence[int]
    tolerance: float = 0.0

    @abstractmethod
    def split(self, rates: Sequence[float]) -> list[float]:
        """Returns the rates of the linears or parts under ``rates`` of the blocks."""

    @abstractmethod
    def bounds(self, least: float, most: float) -> tuple[list[float], list[float]]:
        """Returns the bounds of every rate, where ``least`` and ``most`` bound those that are still possible."""

    def settings(self, rates: Sequence[float]) -> Sequence[Hashable]:
        """Returns, for each block, the rates of its linears or parts."""
        return [tuple(by_name.values()) for by_name in self.by_block(rates)]

    def families(self) -> list[list[Group]]:
        """Returns the indices of the linears or parts of each block, of each name, and of each name in each stretch.

        A stretch is a quarter of the blocks, in their order, and then an eighth.
        """
        places = [(block, re.sub(r"\d+", "*", name)) for block, names in enumerate(self.names) for name in names]
        in_stretches = [[(many * block // len(self.names), name) for block, name in places] for many in STRETCHES]
        return [_groups(keys) for keys in (*zip(*places, strict=True), *in_stretches)]

    def by_block(self, rates: Sequence[_T]) -> list[dict[str, _T]]:
        """Returns ``rates``, or other values of the linears or parts, by block and name."""
        following = iter(rates)
        return [{name: next(following) for name in names} for names in self.names]


def _groups(keys: Sequence[Any]) -> list[Group]:
    """Returns the indices of equal keys together."""
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [tuple(group) for group in groups.values()]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _rows(batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The windows of a batch, each with its attention mask, or None if it has no padding."""
    ids, masks = batch["input_ids"], batch.get("attention_mask")
    for index in range(len(ids)):
        mask_1T = None if masks is None else masks[index : index + 1]
        yield ids[index : index + 1], None if mask_1T is None or bool(mask_1T.all()) else mask_1T


@contextmanager
def model_on_device(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Moves the whole ``model`` to ``device`` for the context, then back."""
    original_device = model.device
    if original_device != device:
        model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if original_device != device:
            model.to(original_device)  # type: ignore[arg-type]
