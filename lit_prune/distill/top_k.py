"""TopK: what the dense model says of every training window, looked up before the cut.

Suffixes: T tokens, K likeliest words, N positions of a batch in a row, R rows of them, V vocabulary.
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

KNOWN = {"input_ids", "attention_mask", "position_ids"}
LEAST = 1e-12  # of the rest, whose logarithm is taken
Said = tuple[Tensor, Tensor]  # of a window: its words, int32, and their log-probabilities, float16, both (T, K)
Window = tuple[bytes, Tensor]  # its name, and which of a row's positions are its own, (T,)


@final
@dataclass(frozen=True)
class TopK(Teacher):
    """Keeps the k likeliest words of every position of the training windows that will be seen, and their probabilities.

    They are looked up once, before the cut, and kept in memory, at 6 k bytes a position: no dense model is there
    while it is trained, and a step costs no second forward pass. What is left of the probability is spread over the
    other words as the student spreads it, so that the divergence is that of k + 1 classes, the rest being one of
    them; it is no greater than the whole one, and equal to it where k is the vocabulary. Probabilities are those at
    the temperature of the distillation.

    A window is known by its tokens and their positions, padding left out, so that order, epochs and the windows that it
    shares a batch with do not matter; but they must be the same windows in every epoch. Of a loader whose order is not
    known every window is looked up. A resumed run looks all up again, and must be as long as it was to be.

    Args:
        k: How many words.

    Raises:
        InputError: for a k below 1.
    """

    reads: ClassVar[bool] = True

    k: int = 64

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"`TopK.k` must be at least 1, a number of words, got {self.k}.")

    def check(self, student: Student) -> None:
        """Raises InputError where the first cut comes later than step 0."""
        if student.steps[0] > 0:
            raise InputError(
                "`pruning.distillation.teacher` must not be TopK where the first cut comes after step 0, a resumed run "
                f"could not look up again what the model said then, got a cut at {student.steps[0]}: use Copy."
            )

    @torch.no_grad()
    def keep(self, dense: DenseModel) -> TeacherState:
        """Returns what the dense model says of the windows that are to come."""
        model = placed(dense.model, dense.device)
        k = min(self.k, model.get_output_embeddings().weight.shape[0])
        said: dict[bytes, Said] = {}
        with evaluating(model):
            for batch in track(dense.windows(), "Teacher"):
                inputs = {name: batch[name].to(dense.device) for name in KNOWN & batch.keys()}
                windows = list(_windows(inputs))
                if all(name in said for name, _ in windows):
                    continue
                logits_BTV = model(**inputs, use_cache=False).logits
                for (name, own_T), logits_TV in zip(windows, logits_BTV, strict=True):
                    logits_TV = logits_TV[own_T.to(logits_TV.device)]
                    top = torch.log_softmax(logits_TV.float() / dense.temperature, dim=-1).topk(k, dim=-1)
                    said.setdefault(name, (top.indices.to(torch.int32).cpu(), top.values.to(torch.float16).cpu()))
        return CachedLogits(said)


class CachedLogits(TeacherState):
    """What was said of every window, by its name."""

    def __init__(self, said: dict[bytes, Said]) -> None:
        self.said = said

    def output(self, inputs: Mapping[str, Tensor]) -> TeacherOutput:
        """Returns what was said of the windows of a batch.

        Raises:
            InputError: for a window that was not looked up, or inputs that it was looked up without.
        """
        if not inputs.keys() <= KNOWN:
            raise InputError(
                f"`pruning.distillation.teacher` must not be TopK where the LLM is called with "
                f"{', '.join(sorted(inputs.keys() - KNOWN))}, without which it looked up: use Copy."
            )
        windows = list(_windows(inputs))
        if not all(name in self.said for name, _ in windows):
            raise InputError(
                "`pruning.distillation.teacher` must not be TopK where the training dataloader gives other windows "
                "than it gave before the cut: use Copy."
            )
        words, logs = zip(*(self.said[name] for name, _ in windows), strict=True)
        known_N, device = torch.cat([own_T for _, own_T in windows]), inputs["input_ids"].device
        words_NK, log_q_NK = (_spread(torch.cat(rows), known_N).to(device) for rows in (words, logs))
        return TopLogits(words_NK.long(), log_q_NK.float(), None if known_N.all() else known_N.to(device))

    def size_bytes(self) -> int:
        """Returns the bytes of words and probabilities."""
        return sum(tensor.numel() * tensor.element_size() for said in self.said.values() for tensor in said)


@final
@dataclass(frozen=True)
class TopLogits(TeacherOutput):
    """The likeliest words of every position.

    Args:
        words_NK: Which they are.
        log_q_NK: The logarithms of their probabilities.
        known_N: Of which positions they are known, where not of all: of padding nothing is said.
    """

    words_NK: Tensor
    log_q_NK: Tensor
    known_N: Tensor | None = None

    def log_q(self, rows_R: Tensor, log_p_RV: Tensor, temperature: float) -> Tensor:
        """Returns log q of these words; the others have p, times the share of the rest in q, by that in p."""
        words_RK, log_q_RK = self.words_NK[rows_R], self.log_q_NK[rows_R]
        rest_R1 = (1 - log_q_RK.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
        others_R1 = log_p_RV.scatter(-1, words_RK, -torch.inf).logsumexp(-1, keepdim=True)
        log_q_RV = (log_p_RV + (rest_R1 - others_R1)).scatter(-1, words_RK, log_q_RK)
        return log_q_RV if self.known_N is None else torch.where(self.known_N[rows_R, None], log_q_RV, log_p_RV)


def _windows(inputs: Mapping[str, Tensor]) -> Iterator[Window]:
    """The windows of a batch, padding left out; no mask is one of ones, and positions that are not given count up."""
    ids_BT = inputs["input_ids"].cpu()
    mask_BT, positions_BT = inputs.get("attention_mask"), inputs.get("position_ids")
    own_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.cpu() != 0
    positions_BT = torch.arange(ids_BT.shape[1]) if positions_BT is None else positions_BT.cpu()
    for ids_T, own_T, positions_T in zip(ids_BT, own_BT, positions_BT.expand_as(ids_BT), strict=True):
        told = torch.stack([ids_T[own_T].long(), positions_T[own_T].long()])
        yield hashlib.sha256(told.numpy().tobytes()).digest(), own_T


def _spread(rows: Tensor, known_N: Tensor) -> Tensor:
    """Puts rows (S, K) where ``known_N`` is true, and zeros elsewhere, (N, K)."""
    if known_N.all():
        return rows
    spread = rows.new_zeros(len(known_N), rows.shape[1])
    spread[known_N] = rows
    return spread
