"""The divergence of a pruned model from the unpruned one, which needs only the last hidden states of the latter.

Suffixes: T tokens of one window, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.errors import InputError

CHUNK_TOKENS = 256  # with a vocabulary of 150,000 every float32 temporary of a chunk takes 150 MB


def divergence(reference_1TV: Tensor, logits_1TV: Tensor, mask_1T: Tensor | None = None) -> Tensor:
    """Returns the mean of KL(p || q) over the tokens that predict one, in nats, p = softmax(reference).

    p = (1/2, 1/2) against q = (1/4, 3/4) gives log(2 / sqrt 3) = 0.1438.
    """
    counted_T = torch.ones_like(logits_1TV[0, :-1, 0], dtype=torch.bool)
    if mask_1T is not None:
        counted_T = mask_1T[0, :-1].bool() & mask_1T[0, 1:].bool()
    total = torch.zeros((), device=logits_1TV.device)
    for rows in torch.where(counted_T)[0].split(CHUNK_TOKENS):
        p_TV, q_TV = (logits_1TV[0, rows].float().log_softmax(-1) for logits_1TV in (reference_1TV, logits_1TV))
        total += (p_TV.exp() * (p_TV - q_TV)).sum()
    return total / counted_T.sum()


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Gives a list that gets the input of the head of ``model``, on the CPU, for every forward pass."""
    inputs: list[Tensor] = []

    def record(head: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].cpu())

    with _before_head(model, record):
        yield inputs


@contextmanager
def appended(model: PreTrainedModel, hidden_1TD: Tensor) -> Iterator[None]:
    """Appends ``hidden_1TD`` to the batch that the head of ``model`` gets, so that the logits have its row as the last.

    Raises:
        InputError: if the head reads another width by now.
    """

    def append(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        if args[0].shape[-1] != hidden_1TD.shape[-1]:
            raise kl_of_sliced_head()
        return (torch.cat([args[0], hidden_1TD.to(args[0])]),)

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
