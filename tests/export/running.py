"""Runs a .gguf file in llama.cpp, through the package xllamacpp."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

# Sampled whatever the model says, since llama.cpp withholds the probabilities of a token that ends within a character.
ASCII = 64


class LlamaCpp:
    """A model loaded by llama.cpp, on one thread."""

    def __init__(self, file: Path, n_ctx: int = 512) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = str(file), n_ctx, 1, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # f16 by default
        self.server = xllamacpp.Server(settings)
        self.complete([1], 1)  # a server that is deleted before its loop has begun waits for it forever

    def complete(self, ids: Sequence[int], tokens: int) -> str:
        """The greedy continuation."""
        return self._complete(prompt=list(ids), n_predict=tokens)["choices"][0]["text"]

    def logprobs(self, ids: Sequence[int], tokens: int) -> Tensor:
        """The log probabilities of the last ``tokens`` of ``ids``, each after those before it."""
        found = []
        for position in range(len(ids) - tokens, len(ids)):
            answer = self._complete(
                prompt=list(ids[:position]), n_predict=1, n_probs=1 << 17, logit_bias=[[ASCII, 1000.0]]
            )
            first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found.append(next(choice["logprob"] for choice in first if choice["id"] == ids[position]))
        return torch.tensor(found)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text."""
        body = json.dumps({"content": text}).encode()
        request = urllib.request.Request(f"{self.server.listening_address}/tokenize", data=body)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    def _complete(self, **fields: Any) -> dict[str, Any]:
        return self.server.handle_completions({"temperature": 0, "cache_prompt": True, "ignore_eos": True, **fields})


@torch.no_grad()
def logprobs(model: PreTrainedModel, ids: Sequence[int], tokens: int) -> Tensor:
    """The same by transformers."""
    logits_TV = model(torch.tensor([ids])).logits[0].float()
    return logits_TV.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[-tokens:, 0]


@torch.no_grad()
def complete(model: PreTrainedModel, ids: Sequence[int], tokens: int) -> list[int]:
    """The greedy continuation by transformers, as tokens."""
    found = list(ids)
    for _ in range(tokens):
        found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def perplexity(logprobs: Tensor) -> float:
    return math.exp(-float(logprobs.mean()))
