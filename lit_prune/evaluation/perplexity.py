"""Perplexity of a causal LM, and the labels that count in it.

Perplexity is exp(mean negative log-likelihood of the next token) without padding. It is computed from fp32 cross
entropy, a chunk of tokens at a time: a softmax followed by a log (as in torchmetrics) can be infinite for fp16 logits,
and fp32 logits of a whole window with a vocabulary of 150,000 would double the memory.
Suffixes: B batch, T tokens, V vocabulary, P predicted positions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.calibration.windows import inputs_of
from lit_prune.evaluation.streamed import streamed_logits
from lit_prune.models.families import has_blocks
from lit_prune.models.on_disk import on_disk
from lit_prune.models.tensors import rows_at_once
from lit_prune.progress import track

IGNORED = -100  # the label of a token whose prediction does not count


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the token ids of a batch, (B, T), with -100 for tokens whose prediction does not count.

    A prediction counts if neither the token nor the one before it is masked, and if its entry in `labels`, if the batch
    has them, is not -100.
    """
    labels_BT, mask_BT = batch.get("labels"), batch.get("attention_mask")
    labels_BT = batch["input_ids"] if labels_BT is None else labels_BT
    if mask_BT is None:
        return labels_BT
    labels_BT = labels_BT.masked_fill(mask_BT == 0, IGNORED)
    labels_BT[:, 1:] = labels_BT[:, 1:].masked_fill(mask_BT[:, :-1] == 0, IGNORED)
    return labels_BT


def negative_log_likelihood(
    logits_BTV: Tensor,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None = None,
    labels_BT: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Returns the summed negative log-likelihood (float64 scalar, nats) and the number of predicted tokens.

    Position t predicts token t + 1; see :func:`labels_of` for the predictions that count.
    Two tokens under uniform logits over V = 4 give one prediction of log 4 = 1.386.

    Args:
        logits_BTV: Scores of the vocabulary, any float type.
        input_ids_BT: Token ids.
        attention_mask_BT: 1 for tokens, 0 for padding; None means no padding.
        labels_BT: The token ids, -100 for those that do not count; None counts all.
    """
    batch = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}
    targets_BT = labels_of({name: tensor for name, tensor in batch.items() if tensor is not None})[:, 1:]
    counted_BT = targets_BT != IGNORED
    total = torch.zeros((), dtype=torch.float64, device=logits_BTV.device)
    for logits_TV, targets_T, counted_T in zip(logits_BTV, targets_BT, counted_BT, strict=True):
        chunk = rows_at_once(logits_TV)
        parts = (tensor.split(chunk) for tensor in (logits_TV[:-1], targets_T, counted_T))
        for logits_PV, targets_P, counted_P in zip(*parts, strict=True):
            nll_P = F.cross_entropy(logits_PV.float(), targets_P, reduction="none")
            total += nll_P[counted_P].double().sum()
    return total, int(counted_BT.sum())


class Perplexity(Metric):
    """The perplexity of a causal LM over the batches of all updates and all processes.

    Raises:
        ValueError: if no token was predicted.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        logits_BTV: Tensor,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
    ) -> None:
        """Adds the predictions of a batch; see :func:`negative_log_likelihood`."""
        if logits_BTV.shape[:2] != input_ids_BT.shape:
            raise ValueError(
                f"`logits` must be (batch, tokens, vocabulary) over `input_ids` (batch, tokens), got "
                f"{tuple(logits_BTV.shape)} and {tuple(input_ids_BT.shape)}."
            )
        nll, tokens = negative_log_likelihood(logits_BTV, input_ids_BT, attention_mask_BT, labels_BT)
        self.nll += nll
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Returns exp(nll / tokens), a float64 scalar."""
        if self.tokens == 0:
            raise ValueError("`Perplexity` must be updated with at least one predicted token, got none.")
        return torch.exp(self.nll / self.tokens)


@dataclass(frozen=True)
class Protocol:
    """The data and the conditions of a perplexity measurement; only values of one protocol are comparable.

    Attributes:
        data: Description of the text.
        windows: Number of windows.
        seq_length: Tokens of the longest window.
        tokens: Number of predicted tokens.
        dtype: Data type of the model, such as `bfloat16`.
    """

    data: str
    windows: int
    seq_length: int
    tokens: int
    dtype: str


@dataclass(frozen=True)
class Measurement:
    """A perplexity and its protocol.

    Attributes:
        perplexity: exp(mean negative log-likelihood).
        protocol: The data and conditions of the measurement.
        seconds: Duration of the measurement.
    """

    perplexity: float
    protocol: Protocol
    seconds: float


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    data: str,
    *,
    label: str = "Perplexity",
    device: torch.device | None = None,
    streamed: bool = False,
) -> Measurement:
    """Returns the perplexity of ``model`` in eval mode, on the device that it is on.

    A model on disk passes all batches through one block after the other. With several processes each measures its shard
    of the batches, all make the same number of forward passes, and all return the perplexity over all batches.

    Args:
        model: A causal LM.
        batches: Dicts with `input_ids` (batch, tokens) and optionally `attention_mask` (for padding), `labels` (if not
            every token counts) and `position_ids` (for packed conversations).
        data: Description of the text, for the protocol.
        label: Text of the progress bar.
        device: Device on which the blocks of a streamed model or a model on disk compute; None is the model's.
        streamed: Move the blocks to ``device`` one at a time, as for a model on disk.

    Raises:
        ValueError: if the batches predict no token.
    """
    metric = Perplexity(sync_on_compute=False).to(model.device)
    windows, seq_length, begin = 0, 0, time.perf_counter()
    with evaluating(model):
        for batch, logits in _logits(model, batches, device or model.device, label, streamed):
            ids = batch["input_ids"]
            metric.update(logits, ids, batch.get("attention_mask"), batch.get("labels"))
            windows, seq_length = windows + ids.shape[0], max(seq_length, ids.shape[1])
    nll, tokens = distributed.all_reduce_sum(metric.nll), distributed.all_reduce_count(int(metric.tokens))
    windows, seq_length = distributed.all_reduce_count(windows), max(distributed.all_gather(seq_length))
    if tokens == 0:
        raise ValueError("`batches` must predict at least one token, got none.")
    protocol = Protocol(data, windows, seq_length, tokens, str(model.dtype).removeprefix("torch."))
    return Measurement(float(torch.exp(nll / tokens)), protocol, time.perf_counter() - begin)


def _logits(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], device: torch.device, label: str, streamed: bool
) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    """Yields every batch of this process and its logits, on the model's device."""
    if (streamed or on_disk(model) is not None) and has_blocks(model):
        shard = [_moved(batch, model.device) for batch, counts in distributed.equal_batches(batches) if counts]
        yield from zip(shard, streamed_logits(model, shard, device, label), strict=True)
        return
    for batch, counts in distributed.equal_batches(track(batches, label)):
        moved = _moved(batch, model.device)
        # also for a batch that does not count: sharded weights are gathered in all processes together
        logits = model(**inputs_of(moved), use_cache=False).logits
        if counts:
            yield moved, logits


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts ``model`` into eval mode for the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
