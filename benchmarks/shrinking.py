"""MLPWidth, HeadGroups and Depth at several shares of channels and of all parameters, without recovery.

    python benchmarks/shrinking.py --pretrained FOLDER --train_files TEXT --val_files RAW --results FILE.jsonl

The results file has one JSON object per case, and an interrupted benchmark continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from resumable import Row, arguments

from lit_prune.allocate import DLP, LayerRedundancy, Uniform
from lit_prune.depth import Depth
from lit_prune.recipe import Recipe
from lit_prune.shrink import HeadGroups, MLPWidth

CHANNELS = (0.25, 0.5)
SHARES = (0.10, 0.15, 0.20, 0.30)  # of all parameters


def cases() -> Iterator[tuple[str, Recipe]]:
    """Yields the name and the recipe of every case."""
    for share in CHANNELS:
        yield f"MLPWidth, {share:.2f} of the channels, Uniform", Recipe(MLPWidth(), share, Uniform())
        yield f"MLPWidth, {share:.2f}, not compensated", Recipe(MLPWidth(compensate=False), share, Uniform())
    for share in SHARES:
        for allocation in (Uniform(), LayerRedundancy(), DLP()):
            name = f"MLPWidth, {share:.2f} of all parameters, {type(allocation).__name__}"
            yield name, Recipe(MLPWidth(), share, allocation, budget="parameters")
    for allocation in (Uniform(), LayerRedundancy()):
        yield f"HeadGroups, a third, {type(allocation).__name__}", Recipe(HeadGroups(), 1 / 3, allocation)
    for method in (Depth(), Depth(refit=True), Depth(contiguous=True), Depth(contiguous=True, refit=True)):
        kind = ("neighbours" if method.contiguous else "least change") + (", refitted" if method.refit else "")
        yield f"Depth, 0.20 of the blocks, {kind}", Recipe(method, 0.2, Uniform())


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a table in Markdown."""
    dense = rows[0]["parameters"]
    lines = [
        f"| {row['case']} | {row['parameters'] / 1e6:.1f} M | {row['parameters'] / dense - 1:+.1%} "
        f"| {row['perplexity']:.2f} |"
        for row in rows
    ]
    return "\n".join(["| case | parameters | change | perplexity |", "| --- | ---: | ---: | ---: |", *lines])


def main() -> None:
    """Runs the missing cases and prints the table."""
    protocol, results = arguments(__doc__, "runs/shrinking.jsonl", num_samples=16, val_windows=6)
    rows = [results.once("dense", partial(protocol.run, None))]
    rows += [results.once(name, partial(protocol.run, recipe)) for name, recipe in cases()]
    print(f"\n{rows[0]['protocol']}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
