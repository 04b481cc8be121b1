"""The divergence of a pruned model from the unpruned one, which needs only the last hidden states of the latter.

Suffixes: T tokens of one window, S those that are compared, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.models.tensors import rows_at_once


def compared(length: int, mask_1T: Tensor | None, most: int | None) -> Tensor:
    """Returns the indices of up to ``most`` tokens that predict one, evenly spread over a window, or of all for None.

    Of 8 tokens 7 predict the next one; 3 of them are 1, 3 and 5.
    """
    predicting_T = torch.ones(length - 1, dtype=torch.bool)
    if mask_1T is not None:
        predicting_T = (mask_1T[0, :-1].bool() & mask_1T[0, 1:].bool()).cpu()
    rows_S = torch.where(predicting_T)[0]
    if most is None or len(rows_S) <= most:
        return rows_S
    return rows_S[(torch.arange(most) * 2 + 1) * len(rows_S) // (2 * most)]


def divergence(reference_SV: Tensor, logits_SV: Tensor) -> Tensor:
    """Returns the mean of KL(p || q) over tokens, in nats, p = softmax(reference) and q = softmax(logits).

    p = (1/2, 1/2) against q = (1/4, 3/4) gives log(2 / sqrt 3) = 0.1438.
    """
    total = torch.zeros((), device=logits_SV.device)
    chunk = rows_at_once(logits_SV)
    for pair in zip(reference_SV.split(chunk), logits_SV.split(chunk), strict=True):
        p_SV, q_SV = (part_SV.float().log_softmax(-1) for part_SV in pair)
        total += (p_SV.exp() * (p_SV - q_SV)).sum()
    return total / len(logits_SV)


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Gives a list that gets the input of the head of ``model``, on the CPU, for every forward pass."""
    inputs: list[Tensor] = []

    def record(head: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].cpu())

    with _before_head(model, record):
        yield inputs


@contextmanager
def appended(model: PreTrainedModel, hidden_1TD: Tensor, rows_S: Tensor) -> Iterator[None]:
    """Gives the head of ``model`` some tokens only, and those of ``hidden_1TD`` as a second row of the batch.

    Args:
        model: The model, which is called with one window.
        hidden_1TD: The input that the head had when it was called with this window before.
        rows_S: The indices of the tokens.

    Raises:
        InputError: if the head reads another width by now.
    """

    def append(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        if args[0].shape[-1] != hidden_1TD.shape[-1]:
            raise kl_of_sliced_head()
        return (torch.cat([args[0][:, rows_S.to(args[0].device)], hidden_1TD[:, rows_S].to(args[0])]),)

    with _before_head(model, append):
        yield


def kl_of_sliced_head() -> InputError:
    """Returns the error for a head whose inputs the unpruned model no longer fits."""
    return InputError(
        "`Search.loss` must be cross_entropy for a method that slices the head, got kl: pass "
        "`--pruning.allocation.loss cross_entropy`, or leave `slice_head` out."
    )


@contextmanager
def _before_head(model: PreTrainedModel, hook: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
