"""Tokens per second of prefill and decode."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.evaluation.perplexity import evaluating

PREFILL_TOKENS, DECODE_TOKENS = 512, 32
LEAST_RUNS, MOST_RUNS, LEAST_SECONDS = 3, 25, 3.0  # of each model: the best of 3 short runs says little


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one sequence.

    Attributes:
        prefill: Tokens of the prompt per second.
        decode: Generated tokens per second.
        device: The device, such as `NVIDIA H200` or `CPU, 2 threads`; None if it is not known.
    """

    prefill: float
    decode: float
    device: str | None = None


def tokens_per_second(model: PreTrainedModel) -> Speed:
    """Returns the tokens per second of one sequence, the best of several runs after a warm-up run.

    There are three runs, or as many as take three seconds, at most 25.
    Prefill is one forward pass over 512 tokens (or half of the model's limit, if that is less); decode is the 32
    forward passes of one token that follow it, with a KV cache. The token ids are arbitrary.
    """
    return compare_speed([model])[0]


@torch.no_grad()
def compare_speed(models: Sequence[PreTrainedModel]) -> list[Speed]:
    """Returns what :func:`tokens_per_second` does for each model; they run by turns, so that all are slowed alike."""
    runs: list[list[tuple[float, float]]] = [[] for _ in models]
    for number in range(MOST_RUNS + 1):
        for model, seconds in zip(models, runs, strict=True):
            with evaluating(model):
                taken = _run(model, *_lengths(model))
            if number:  # the first one warms up
                seconds.append(taken)
        if number >= LEAST_RUNS and min(sum(map(sum, seconds)) for seconds in runs) >= LEAST_SECONDS:
            break
    return [_best(model, seconds) for model, seconds in zip(models, runs, strict=True)]


def without_weights(model: PreTrainedModel) -> PreTrainedModel | None:
    """Returns a copy of ``model`` on the meta device; None if one of its shapes cannot be built from its config."""
    kind: Any = type(model)
    try:
        with torch.device("meta"):
            like: PreTrainedModel = kind(copy.deepcopy(model.config)).to(model.dtype)
    except Exception:  # whatever the constructor of an unknown family raises
        return None
    shapes = [[(name, tensor.shape) for name, tensor in one.named_parameters()] for one in (model, like)]
    return like if shapes[0] == shapes[1] else None


@torch.no_grad()
def with_random_weights(like: PreTrainedModel, buffers: PreTrainedModel) -> PreTrainedModel:
    """Returns ``like``, a model on the meta device, with random weights, which take as long to multiply as others.

    Args:
        like: The result of :func:`without_weights`.
        buffers: A model on the device to use, whose buffers of the same names and shapes are copied.
    """
    like = like.to_empty(device=buffers.device).eval()
    like.tie_weights()  # to_empty has untied them
    tile = 0.02 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))  # random numbers for all are slow
    for parameter in like.parameters():
        repeated = tile.to(parameter).repeat(-(-parameter.numel() // len(tile)))
        parameter.copy_(repeated[: parameter.numel()].view_as(parameter))
    known = dict(buffers.named_buffers())
    for name, buffer in like.named_buffers():
        found = known.get(name)
        buffer.copy_(found) if found is not None and found.shape == buffer.shape else buffer.zero_()
    return like


def _lengths(model: PreTrainedModel) -> tuple[Tensor, int]:
    """The prompt, and the number of tokens after it."""
    text = model.config.get_text_config()  # of a multimodal model; else the config itself
    limit = getattr(text, "max_position_embeddings", None) or 2 * PREFILL_TOKENS
    prefill, decode = min(PREFILL_TOKENS, limit // 2), min(DECODE_TOKENS, limit // 2)
    return torch.arange(prefill, device=model.device)[None] % text.vocab_size, decode


def _best(model: PreTrainedModel, runs: Sequence[tuple[float, float]]) -> Speed:
    prompt_BT, decode = _lengths(model)
    return Speed(
        prefill=prompt_BT.shape[1] / min(seconds for seconds, _ in runs),
        decode=decode / min(seconds for _, seconds in runs),
        device=_name(model.device),
    )


def _name(device: torch.device) -> str:
    """Returns the name of a device for readers; that of the CPU has the number of threads, which speeds depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else device.type


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
