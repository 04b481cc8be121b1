"""Perplexity of {Uniform, DLP} x {0.5, 0.7} under Wanda, with both ways of propagating; takes up where it was stopped.

    python benchmarks/quality.py --pretrained FOLDER --train_files TEXT --val_files RAW --results FILE.jsonl

Every line of the results file is one case.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from resumable import arguments

from lit_prune.allocate import DLP, Uniform
from lit_prune.pipeline import Recipe
from lit_prune.prune import Wanda


def cases() -> Iterator[tuple[str, Recipe | None]]:
    """Yields a name and a recipe; the dense model has none."""
    yield "dense", None
    for propagate in ("dense", "pruned"):
        for sparsity in (0.5, 0.7):
            for allocation in (Uniform(), DLP()):
                name = f"Wanda(propagate: {propagate}), {type(allocation).__name__}, {sparsity}"
                yield name, Recipe(Wanda(propagate=propagate), sparsity, allocation)  # type: ignore[arg-type]


def main() -> None:
    """Runs the cases that the results file has not, and prints all as a table."""
    protocol, results = arguments(__doc__, "runs/quality.jsonl")
    rows = [results.once(name, partial(protocol.run, recipe)) for name, recipe in cases()]
    print(f"\n{rows[0]['protocol']}\n\n| case | perplexity | sparsity | seconds |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {row['case']} | {row['perplexity']:.2f} | {row['sparsity']:.4f} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    main()
