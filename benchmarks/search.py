"""Gain of a search over its initial rates, with learned moves and with uniformly drawn blocks, for three seeds.

    python benchmarks/search.py
    python benchmarks/search.py --pretrained FOLDER --train_files TEXT --val_files RAW --seq_length 1024 \\
        --val_windows 6 --val_length 2048 --sparsity 0.7 --results FILE.jsonl

The results file has one JSON object per case. The state of every search is stored beside it, so that an interrupted
benchmark continues.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

from jsonargparse import ArgumentParser
from resumable import Protocol, Results, Row

from lit_prune.allocate import DLP, Allocation, Search, Uniform
from lit_prune.pruning import Wanda
from lit_prune.recipe import Recipe
from lit_prune.search import evolution


def cases(evaluations: int, seeds: int, results: Results) -> Iterator[tuple[str, Allocation, int]]:
    """Yields a name, an allocation, and the number of blocks drawn for a move; 1 is uniform, as in EvoPress."""
    yield "Uniform", Uniform(), 1
    yield "DLP", DLP(), 1
    for contenders, moves in ((evolution.CONTENDERS, "learned"), (1, "uniform")):
        for seed in range(seeds):
            state = results.path.with_suffix(f".{moves.split()[0]}{seed}.json")
            yield (
                f"Search, moves {moves}, seed {seed}",
                Search(evaluations=evaluations, seed=seed, state=str(state)),
                contenders,
            )


def main() -> None:
    """Runs the missing cases and prints all of them as a table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(Protocol, as_group=False)
    parser.add_argument("--results", default="runs/search.jsonl", help="Results file, one JSON object per line.")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--evaluations", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.set_defaults(num_samples=16, seq_length=256, val_windows=24, val_length=256)
    settings = parser.parse_args()
    results, sparsity = Results(settings.pop("results")), settings.pop("sparsity")
    evaluations, seeds = settings.pop("evaluations"), settings.pop("seeds")
    protocol = Protocol(**settings.as_dict())

    def run(allocation: Allocation, contenders: int) -> Row:
        with mock.patch.object(evolution, "CONTENDERS", contenders):
            return protocol.run(Recipe(Wanda(), sparsity, allocation))

    print("| case | perplexity | seconds |\n| --- | ---: | ---: |")
    for name, allocation, contenders in cases(evaluations, seeds, results):
        row = results.once(name, lambda allocation=allocation, contenders=contenders: run(allocation, contenders))
        print(f"| {name} | {row['perplexity']:.2f} | {row['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
