"""Constant against dynamic slicing, at equal mean slice and at equal size; takes up where it was stopped.

    python benchmarks/slices.py --pretrained FOLDER --train_files TEXT --val_files RAW --results FILE.jsonl

Every line of the results file is one case. At equal size, a dynamic pattern is sliced more, by as much as gives it the
parameters of the constant one: the width of the first block is that of the embedding too, so that a pattern which
spares the first block makes a bigger model at the same mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from resumable import Protocol, Row, arguments

from lit_prune.allocate import DLP, Allocation, LayerRedundancy, Uniform, allocate
from lit_prune.load import load_config
from lit_prune.pipeline import Recipe
from lit_prune.slice import Slicing, sizes_from_rates, sliced_parameters

MEANS = (0.20, 0.25, 0.30)
BELOW = (0.05, 0.10, 0.15)  # how far the base of LayerRedundancy lies below the mean


def patterns(mean: float) -> dict[str, Allocation]:
    """Returns the dynamic patterns that are tried at a mean slice, by their names."""
    redundancy = {f"LayerRedundancy, base -{below:.2f}": LayerRedundancy(round(mean - below, 3)) for below in BELOW}
    return redundancy | {"DLP, alpha 0.15": DLP(), "DLP, alpha 0.05": DLP(alpha=0.05)}


def at_size(pattern: str, scores: Sequence[float], parameters: int, protocol: Protocol) -> tuple[float, Allocation]:
    """Returns the mean slice at which a pattern gives a model of at most ``parameters``, and the pattern there."""
    config, mean = load_config(protocol.pretrained), MEANS[0]
    while True:
        allocation = patterns(mean)[pattern]
        rates = allocate(allocation, scores, mean, sizes=[config.hidden_size] * len(scores))
        sizes = sizes_from_rates(rates, config.hidden_size, Slicing().multiple)
        if sliced_parameters(config, [*sizes, config.hidden_size]) <= parameters:
            return mean, allocation
        mean = round(mean + 0.001, 3)


def main() -> None:
    """Runs the cases that the results file has not, and prints all as a table."""
    protocol, results = arguments(__doc__, "runs/slices.jsonl", num_samples=16, val_windows=6)

    def once(name: str, mean: float, allocation: Allocation) -> Row:
        return results.once(name, partial(protocol.run, Recipe(Slicing(), mean, allocation)))

    rows = [results.once("dense", partial(protocol.run, None))]
    for mean in MEANS:
        constant = once(f"constant, mean {mean:.2f}", mean, Uniform())
        dynamic = {name: once(f"{name}, mean {mean:.2f}", mean, rule) for name, rule in patterns(mean).items()}
        rows += [constant, *dynamic.values()]
        for name, row in dynamic.items():
            sliced, rule = at_size(name, row["scores"], constant["parameters"], protocol)
            rows.append(once(f"{name}, size of constant {mean:.2f}", sliced, rule))
    tell(rows)


def tell(rows: Sequence[Row]) -> None:
    """Prints the table."""
    print(f"\n{rows[0]['protocol']}\n\n| case | mean slice | perplexity | parameters | seconds |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['case']} | {row['sparsity']:.3f} | {row['perplexity']:.2f} | {row['parameters'] / 1e6:.2f} M "
            f"| {row['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
