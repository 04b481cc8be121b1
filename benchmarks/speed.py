"""Tokens per second of two models, measured alternately in one process, so that a busy machine slows both equally.

python benchmarks/speed.py --dense FOLDER --other runs/smollm2_slice_lora/model
"""

from __future__ import annotations

from statistics import median

from jsonargparse import auto_cli

from lit_prune.evaluation.speed import tokens_per_second
from lit_prune.models.load import load_model


def main(dense: str = "embedded", other: str = "embedded", turns: int = 5) -> None:
    """Prints the tokens per second of both in prefill and decode, and the median, smallest and largest ratio.

    Args:
        dense: Hub id, folder, .gguf file or `embedded`.
        other: The model to compare with it.
        turns: Number of measurements of each model.
    """
    models = [load_model(name, "float32") for name in (dense, other)]
    measurements = [[tokens_per_second(model) for model in models] for _ in range(turns)]
    for part in ("prefill", "decode"):
        ratios = [getattr(turn[1], part) / getattr(turn[0], part) for turn in measurements]
        speeds = [median(getattr(turn[model], part) for turn in measurements) for model in (0, 1)]
        print(
            f"{part}: {speeds[0]:.1f} and {speeds[1]:.1f} tokens per second; ratio {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) over {turns} turns"
        )


if __name__ == "__main__":
    auto_cli(main)
