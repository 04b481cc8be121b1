"""Perplexity of {Uniform, DLP} x {0.5, 0.7} under Wanda, with both ways of propagating; takes up where it was stopped.

    python benchmarks/quality.py --pretrained FOLDER --train_files TEXT --val_files RAW --results FILE.jsonl

Every line of the results file is one case. Protocol: calibration on `num_samples` windows of `seq_length` tokens of the
training text (seed 0), perplexity on the first `val_windows` windows of `val_length` tokens of the validation text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from lit_prune.allocate import DLP, Uniform
from lit_prune.calibrate import batches_of
from lit_prune.data import TextDataModule
from lit_prune.evaluate import measure
from lit_prune.load import load_model
from lit_prune.pipeline import Recipe, prune
from lit_prune.prune import Wanda

Case = tuple[str, Recipe | None]


def cases() -> Iterator[Case]:
    """Yields a name and a recipe; the dense model has none."""
    yield "dense", None
    for propagate in ("dense", "pruned"):
        for sparsity in (0.5, 0.7):
            for allocation in (Uniform(), DLP()):
                name = f"Wanda(propagate: {propagate}), {type(allocation).__name__}, {sparsity}"
                yield name, Recipe(Wanda(propagate=propagate), sparsity, allocation)  # type: ignore[arg-type]


def main(
    pretrained: str = "embedded",
    train_files: str | None = None,
    val_files: str | None = None,
    results: str = "runs/quality.jsonl",
    num_samples: int = 32,
    seq_length: int = 1024,
    val_windows: int = 12,
    val_length: int = 2048,
) -> None:
    """Runs the cases that the results file has not, and prints all as a table.

    Args:
        pretrained: Hub id, folder, .gguf file or `embedded`.
        train_files: Text to calibrate on; null takes Python's documentation.
        val_files: Text to evaluate on.
        results: File of results, one JSON object a line.
        num_samples: Calibration windows.
        seq_length: Tokens per calibration window.
        val_windows: Validation windows.
        val_length: Tokens per validation window.
    """
    data = TextDataModule(
        pretrained,
        train_files=train_files,
        val_files=val_files,
        seq_length=val_length,
        batch_size=1,
        val_windows=val_windows,
    )
    path = Path(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    batches = batches_of(data.calibration_windows(num_samples, seq_length, seed=0), 1)
    for name, recipe in cases():
        if name not in {row["case"] for row in done}:
            row = run(name, recipe, pretrained, batches, data)
            done.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(f"\n{done[0]['protocol']}\n\n| case | perplexity | sparsity | seconds |\n| --- | ---: | ---: | ---: |")
    for row in done:
        print(f"| {row['case']} | {row['perplexity']:.2f} | {row['sparsity']:.4f} | {row['seconds']:.0f} |")


def run(name: str, recipe: Recipe | None, pretrained: str, batches: Any, data: TextDataModule) -> dict[str, Any]:
    """Returns one case's row."""
    print(name, file=sys.stderr)
    model = load_model(pretrained, "float32")
    pruned = None if recipe is None else prune(model, batches, recipe)
    found = measure(model, data.val_dataloader(), data.describe("val"))
    return {
        "case": name,
        "perplexity": found.perplexity,
        "sparsity": 0.0 if pruned is None else pruned.sparsity,
        "seconds": 0.0 if pruned is None else sum(pruned.seconds.values()),
        "protocol": found.protocol,
    }


if __name__ == "__main__":
    auto_cli(main)
