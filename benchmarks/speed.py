"""Tokens per second of two models, by turns in one process, so that a busy machine slows both alike.

python benchmarks/speed.py --dense FOLDER --other runs/smollm2_slice_lora/model
"""

from __future__ import annotations

from statistics import median

from jsonargparse import auto_cli

from lit_prune.evaluation.speed import tokens_per_second
from lit_prune.models.load import load_model


def main(dense: str = "embedded", other: str = "embedded", turns: int = 5) -> None:
    """Prints, for prefill and decode, the tokens per second of both and the ratios, smallest, median and largest.

    Args:
        dense: Hub id, folder, .gguf file or `embedded`.
        other: The same, of the model that is compared.
        turns: How often each model is measured.
    """
    models = [load_model(name, "float32") for name in (dense, other)]
    found = [[tokens_per_second(model) for model in models] for _ in range(turns)]
    for part in ("prefill", "decode"):
        ratios = [getattr(turn[1], part) / getattr(turn[0], part) for turn in found]
        speeds = [median(getattr(turn[model], part) for turn in found) for model in (0, 1)]
        print(
            f"{part}: {speeds[0]:.1f} and {speeds[1]:.1f} tokens a second; ratio {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) over {turns} turns"
        )


if __name__ == "__main__":
    auto_cli(main)
