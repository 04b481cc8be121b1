"""Tokens per second of prefill and decode."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.evaluation.perplexity import evaluating

PREFILL_TOKENS, DECODE_TOKENS, REPEATS = 512, 32, 3


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one sequence, in prefill and in decode."""

    prefill: float
    decode: float


@torch.no_grad()
def tokens_per_second(model: PreTrainedModel) -> Speed:
    """Returns the tokens per second of one sequence, the best of three runs after a warm-up run.

    Prefill is one forward pass over 512 tokens (or half of the model's limit, if that is less); decode is the 32
    forward passes of one token that follow it, with a KV cache. The token ids are arbitrary.
    """
    text = model.config.get_text_config()  # of a multimodal model; else the config itself
    limit = getattr(text, "max_position_embeddings", None) or 2 * PREFILL_TOKENS
    prefill, decode = min(PREFILL_TOKENS, limit // 2), min(DECODE_TOKENS, limit // 2)
    prompt_BT = torch.arange(prefill, device=model.device)[None] % text.vocab_size
    with evaluating(model):
        runs = [_run(model, prompt_BT, decode) for _ in range(REPEATS + 1)][1:]
    return Speed(
        prefill=prefill / min(seconds for seconds, _ in runs),
        decode=decode / min(seconds for _, seconds in runs),
    )


def _run(model: PreTrainedModel, prompt_BT: Tensor, decode: int) -> tuple[float, float]:
    """The seconds of the prefill, and those of ``decode`` tokens after it."""
    cache = None

    def run_prefill() -> None:
        nonlocal cache
        cache = model(prompt_BT, use_cache=True, logits_to_keep=1).past_key_values

    def run_decode() -> None:
        for _ in range(decode):
            model(prompt_BT[:, :1], past_key_values=cache, use_cache=True)

    return _seconds(run_prefill, model.device), _seconds(run_decode, model.device)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
