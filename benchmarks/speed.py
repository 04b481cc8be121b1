"""Tokens per second of two models, measured alternately in one process, so that a busy machine slows both equally.

python benchmarks/speed.py --dense FOLDER --other runs/smollm2_slice_lora/model
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import auto_cli
from transformers import PreTrainedModel

from lit_prune.evaluation.speed import DECODE_TOKENS, PREFILL_TOKENS, Speed, tokens_per_second
from lit_prune.export.llama_cpp import convert
from lit_prune.models.load import load_model

TURNS = 5
COMPLETIONS = 8  # of llama.cpp in a turn, of which the fastest counts


def by_turns(dense: Callable[[], Speed], other: Callable[[], Speed], turns: int = TURNS) -> dict[str, Any]:
    """Returns the median speeds of two models and the median, smallest and largest ratio, for prefill and decode."""
    measured = [(dense(), other()) for _ in range(turns)]
    row: dict[str, Any] = {}
    for part in ("prefill", "decode"):
        pairs = [(getattr(first, part), getattr(second, part)) for first, second in measured]
        ratios = [second / first for first, second in pairs]
        speeds = [median(pair[model] for pair in pairs) for model in (0, 1)]
        row[part] = {"speeds": speeds, "ratio": median(ratios), "range": [min(ratios), max(ratios)]}
    return row


def in_transformers(dense: PreTrainedModel, other: PreTrainedModel) -> dict[str, Any]:
    """Returns the speeds of two models in transformers, in their own data type."""
    return by_turns(partial(tokens_per_second, dense), partial(tokens_per_second, other))


def in_llama_cpp(dense: PreTrainedModel, other: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Returns the speeds of two models in llama.cpp, as .gguf files in f16, and the bytes of the files."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.gguf" for name in ("dense", "other")]
        for model, file in zip((dense, other), files, strict=True):
            convert(model, tokenizer, file, "f16", name=file.stem, metadata={})
        limit = dense.config.max_position_embeddings // 2
        prompt = [token % dense.config.vocab_size for token in range(1, min(PREFILL_TOKENS, limit) + 1)]
        first, second = (partial(_complete, _server(file), prompt) for file in files)
        return by_turns(first, second) | {"bytes": [file.stat().st_size for file in files]}


def _server(file: Path) -> Any:
    """Returns a llama.cpp that runs the file on as many threads as torch has."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.verbosity, settings.n_parallel = str(file), 0, 1
    settings.n_ctx = 2 * (PREFILL_TOKENS + DECODE_TOKENS)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    return xllamacpp.Server(settings)


def _complete(server: Any, prompt: list[int]) -> Speed:
    """Returns the tokens per second of greedy continuations, the best of some, by llama.cpp's own clock."""
    fields = {"prompt": prompt, "n_predict": DECODE_TOKENS, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    timings = [server.handle_completions(fields)["timings"] for _ in range(COMPLETIONS)]
    prefill, decode = (max(each[f"{part}_per_second"] for each in timings) for part in ("prompt", "predicted"))
    return Speed(prefill=prefill, decode=decode)


def main(dense: str = "embedded", other: str = "embedded", turns: int = TURNS) -> None:
    """Prints the tokens per second of both in prefill and decode, and the median, smallest and largest ratio.

    Args:
        dense: Hub id, folder, .gguf file or `embedded`.
        other: The model to compare with it.
        turns: Number of measurements of each model.
    """
    models = [partial(tokens_per_second, load_model(name, "float32")) for name in (dense, other)]
    for part, found in by_turns(*models, turns).items():
        print(
            f"{part}: {found['speeds'][0]:.1f} and {found['speeds'][1]:.1f} tokens per second; ratio "
            f"{found['ratio']:.2f} ({found['range'][0]:.2f} to {found['range'][1]:.2f}) over {turns} turns"
        )


if __name__ == "__main__":
    auto_cli(main)
