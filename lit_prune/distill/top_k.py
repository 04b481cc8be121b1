"""TopK: the dense model's k largest log-probabilities for every training window, computed before the cut.

Suffixes: T tokens; K most likely tokens; N positions of a batch, flattened; R rows selected from them; V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lit_prune.distill.base import DenseModel, Student, Teacher, TeacherOutput, TeacherState
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import evaluating
from lit_prune.models.on_disk import placed
from lit_prune.progress import track

INPUTS = {"input_ids", "attention_mask", "position_ids"}
MIN_REST = (
    1e-12  # lower bound of the remaining probability before its logarithm: by rounding in float16 it may be 0 or less
)
WindowTopK = tuple[Tensor, Tensor]  # of one window: tokens, int32, and their log-probabilities, float16, both (T, K)
Window = tuple[bytes, Tensor]  # digest of a window, and the mask of a row's positions that are not padding, (T,)


@final
@dataclass(frozen=True)
class TopK(Teacher):
    """Caches the dense model's k most likely tokens at every position of the training windows, with log-probabilities.

    They are computed once, before the cut, and cached in memory at 6 k bytes per position: training needs no dense
    model, and a step takes no second forward pass. The remaining probability is spread over the other tokens in the
    student's proportions, so the divergence is that of k + 1 classes, of which the last one is all other tokens. It is
    at most the full divergence, and equal to it if k is the size of the vocabulary. Probabilities are taken at the
    temperature of the distillation.

    A window is identified by its tokens and their positions, without padding. Order, epochs and the composition of
    batches do not matter, but every epoch must have the same windows. If the order of the dataloader is not known, all
    of its windows are cached. A resumed run computes all of them again, and must have the same length.

    Args:
        k: Number of tokens.

    Raises:
        InputError: for a k below 1.
    """

    needs_windows: ClassVar[bool] = True

    k: int = 64

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"`TopK.k` must be at least 1, a number of tokens, got {self.k}.")

    def check(self, student: Student) -> None:
        """Raises InputError if the first cut comes after step 0."""
        if student.steps[0] > 0:
            raise InputError(
                "`pruning.distillation.teacher` must not be TopK if the first cut comes after step 0, since a resumed "
                f"run could not compute the outputs of that model again, got a cut at {student.steps[0]}: use Copy."
            )

    @torch.no_grad()
    def prepare(self, dense: DenseModel) -> TeacherState:
        """Returns the cached outputs of the dense model for the coming windows."""
        model = placed(dense.model, dense.device)
        k = min(self.k, model.get_output_embeddings().weight.shape[0])
        cache: dict[bytes, WindowTopK] = {}
        with evaluating(model):
            for batch in track(dense.windows(), "Teacher"):
                inputs = {name: batch[name].to(dense.device) for name in INPUTS & batch.keys()}
                windows = list(_windows(inputs))
                if all(digest in cache for digest, _ in windows):
                    continue
                logits_BTV = model(**inputs, use_cache=False).logits
                for (digest, unpadded_T), logits_TV in zip(windows, logits_BTV, strict=True):
                    logits_TV = logits_TV[unpadded_T.to(logits_TV.device)]
                    top = torch.log_softmax(logits_TV.float() / dense.temperature, dim=-1).topk(k, dim=-1)
                    cache.setdefault(digest, (top.indices.to(torch.int32).cpu(), top.values.to(torch.float16).cpu()))
        return CachedLogits(cache)


class CachedLogits(TeacherState):
    """The outputs for all training windows, by the digest of the window."""

    def __init__(self, cache: dict[bytes, WindowTopK]) -> None:
        self.cache = cache

    def output(self, inputs: Mapping[str, Tensor]) -> TeacherOutput:
        """Returns the cached outputs for the windows of a batch.

        Raises:
            InputError: for a window that is not in the cache, or for inputs other than those it was computed from.
        """
        if not inputs.keys() <= INPUTS:
            raise InputError(
                f"`pruning.distillation.teacher` must not be TopK if the LLM is called with "
                f"{', '.join(sorted(inputs.keys() - INPUTS))}, which its outputs were computed without: use Copy."
            )
        windows = list(_windows(inputs))
        if not all(digest in self.cache for digest, _ in windows):
            raise InputError(
                "`pruning.distillation.teacher` must not be TopK if the training dataloader gives other windows "
                "than it gave before the cut: use Copy."
            )
        tokens, log_q = zip(*(self.cache[digest] for digest, _ in windows), strict=True)
        unpadded_N, device = torch.cat([unpadded_T for _, unpadded_T in windows]), inputs["input_ids"].device
        tokens_NK, log_q_NK = (_scatter_rows(torch.cat(rows), unpadded_N).to(device) for rows in (tokens, log_q))
        return TopKOutput(tokens_NK.long(), log_q_NK.float(), None if unpadded_N.all() else unpadded_N.to(device))

    def size_bytes(self) -> int:
        """Returns the bytes of tokens and log-probabilities."""
        return sum(tensor.numel() * tensor.element_size() for window in self.cache.values() for tensor in window)


@final
@dataclass(frozen=True)
class TopKOutput(TeacherOutput):
    """The k most likely tokens at every position.

    Args:
        tokens_NK: The tokens.
        log_q_NK: Their log-probabilities.
        unpadded_N: Mask of the positions that are not padding, which alone have an output; None without padding.
    """

    tokens_NK: Tensor
    log_q_NK: Tensor
    unpadded_N: Tensor | None = None

    def log_q(self, rows_R: Tensor, log_p_RV: Tensor, temperature: float) -> Tensor:
        """Returns log q of the k tokens, and log p of the others, shifted so that all probabilities sum to 1."""
        tokens_RK, log_q_RK = self.tokens_NK[rows_R], self.log_q_NK[rows_R]
        rest_of_q_R1 = (1 - log_q_RK.exp().sum(-1, keepdim=True)).clamp(min=MIN_REST).log()
        rest_of_p_R1 = log_p_RV.scatter(-1, tokens_RK, -torch.inf).logsumexp(-1, keepdim=True)
        log_q_RV = (log_p_RV + (rest_of_q_R1 - rest_of_p_R1)).scatter(-1, tokens_RK, log_q_RK)
        # padding gets the student's own distribution, whose divergence and gradient are 0
        return log_q_RV if self.unpadded_N is None else torch.where(self.unpadded_N[rows_R, None], log_q_RV, log_p_RV)


def _windows(inputs: Mapping[str, Tensor]) -> Iterator[Window]:
    """Yields the digest and the mask of each row; the attention mask defaults to 1, positions to 0, 1, 2, ..."""
    ids_BT = inputs["input_ids"].cpu()
    mask_BT, positions_BT = inputs.get("attention_mask"), inputs.get("position_ids")
    unpadded_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.cpu() != 0
    positions_BT = torch.arange(ids_BT.shape[1]) if positions_BT is None else positions_BT.cpu()
    for ids_T, unpadded_T, positions_T in zip(ids_BT, unpadded_BT, positions_BT.expand_as(ids_BT), strict=True):
        content = torch.stack([ids_T[unpadded_T].long(), positions_T[unpadded_T].long()])
        yield hashlib.sha256(content.numpy().tobytes()).digest(), unpadded_T


def _scatter_rows(rows: Tensor, unpadded_N: Tensor) -> Tensor:
    """Returns (N, K) with ``rows`` where ``unpadded_N`` is True and zeros elsewhere."""
    if unpadded_N.all():
        return rows
    scattered = rows.new_zeros(len(unpadded_N), rows.shape[1])
    scattered[unpadded_N] = rows
    return scattered
