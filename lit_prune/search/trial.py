"""Trials: the loss that a model would have if it were pruned at given rates.

Suffixes: T tokens of one window.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import negative_log_likelihood


class Trial(ABC):
    """A model that can temporarily be pruned at any rates.

    Args:
        model: The causal LM, in eval mode, on one device.
        batches: The calibration batches; every row with at least one predicted token is a window.

    Attributes:
        tokens: Number of tokens that each window predicts.
        granularity: For each block, the number of units (weights or dimensions) of which every change is a multiple.
    """

    granularity: Sequence[int]

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.model = model
        rows = [row for batch in batches for row in _rows(batch)]
        counts = [_predicted(*row) for row in rows]
        self._rows = [row for row, count in zip(rows, counts, strict=True) if count]
        self.tokens = [count for count in counts if count]

    @abstractmethod
    def take(self, rates: Sequence[float]) -> None:
        """Gives the model the weights, or close to those, that a cut with one of ``rates`` per block would leave."""

    @torch.no_grad()
    def loss(self, rates: Sequence[float], window: int) -> float:
        """Returns the mean cross entropy of the next token over one window, in nats; infinity for NaN."""
        self.take(rates)
        ids_1T, mask_1T = self._rows[window]
        ids_1T = ids_1T.to(self.model.device)
        mask_1T = None if mask_1T is None else mask_1T.to(self.model.device)
        logits_1TV = self.model(input_ids=ids_1T, attention_mask=mask_1T, use_cache=False).logits
        nll, tokens = negative_log_likelihood(logits_1TV, ids_1T, mask_1T)
        mean = float(nll) / tokens
        return mean if math.isfinite(mean) else math.inf


def _rows(batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The windows of a batch, each with its attention mask, or None if it has no padding."""
    ids, masks = batch["input_ids"], batch.get("attention_mask")
    for index in range(len(ids)):
        mask_1T = None if masks is None else masks[index : index + 1]
        yield ids[index : index + 1], None if mask_1T is None or bool(mask_1T.all()) else mask_1T


def _predicted(ids_1T: Tensor, mask_1T: Tensor | None) -> int:
    if mask_1T is None:
        return ids_1T.shape[1] - 1
    return int((mask_1T[:, 1:].bool() & mask_1T[:, :-1].bool()).sum())


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
