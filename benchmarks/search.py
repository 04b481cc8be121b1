"""Gain of a search over its initial rates, with learned moves and with uniformly drawn blocks, for three seeds.

    python benchmarks/search.py
    python benchmarks/search.py --method SparseGPT --start Uniform --sparsity 0.7 --evaluations 200 --seeds 1 --settings
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

from lit_prune import allocate, pruning
from lit_prune.allocate import Allocation, Arithmetic, Search, Uniform
from lit_prune.recipe import Recipe
from lit_prune.search import evolution


def cases(start: Allocation, evaluations: int, seeds: int, results: Results) -> Iterator[tuple[str, Allocation, int]]:
    """Yields a name, an allocation, and the number of blocks drawn for a move; 1 is uniform, as in EvoPress."""
    yield "Uniform", Uniform(), 1
    if start != Uniform():
        yield type(start).__name__, start, 1
    for contenders, moves in ((evolution.CONTENDERS, "learned"), (1, "uniform")):
        for seed in range(seeds):
            state = results.path.with_suffix(f".{moves.split()[0]}{seed}.json")
            yield (
                f"Search, moves {moves}, seed {seed}",
                Search(start, evaluations=evaluations, seed=seed, state=str(state)),
                contenders,
            )


def settings_cases(
    start: Allocation, evaluations: int, seeds: int, results: Results
) -> Iterator[tuple[str, Allocation, int]]:
    """Yields searches with every loss and level, and Arithmetic; see :func:`cases`."""
    yield type(start).__name__, start, 1
    yield "Arithmetic", Arithmetic(), 1
    for level, step in (("blocks", 0.02), ("linears", 0.1)):
        for loss in ("cross_entropy", "kl"):
            for seed in range(seeds):
                state = str(results.path.with_suffix(f".{level}-{loss}{seed}.json"))
                search = Search(start, evaluations, step=step, level=level, loss=loss, seed=seed, state=state)  # type: ignore[arg-type]
                yield f"Search, {level}, {loss}, seed {seed}", search, evolution.CONTENDERS


def main() -> None:
    """Runs the missing cases and prints all of them as a table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(Protocol, as_group=False)
    parser.add_argument("--results", default="runs/search.jsonl", help="Results file, one JSON object per line.")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--evaluations", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", default="Wanda", help="Name of the mask method.")
    parser.add_argument("--start", default="DLP", help="Name of the allocation of the initial rates.")
    parser.add_argument("--settings", action="store_true", help="Compare losses and levels instead of ways to move.")
    parser.set_defaults(num_samples=16, seq_length=256, val_windows=24, val_length=256)
    settings = parser.parse_args()
    results, sparsity = Results(settings.pop("results")), settings.pop("sparsity")
    evaluations, seeds = settings.pop("evaluations"), settings.pop("seeds")
    method, start = getattr(pruning, settings.pop("method"))(), getattr(allocate, settings.pop("start"))()
    chosen = settings_cases if settings.pop("settings") else cases
    protocol = Protocol(**settings.as_dict())

    def run(allocation: Allocation, contenders: int) -> Row:
        with mock.patch.object(evolution, "CONTENDERS", contenders):
            return protocol.run(Recipe(method, sparsity, allocation))

    print("| case | perplexity | seconds |\n| --- | ---: | ---: |")
    for name, allocation, contenders in chosen(start, evaluations, seeds, results):
        row = results.once(name, lambda allocation=allocation, contenders=contenders: run(allocation, contenders))
        print(f"| {name} | {row['perplexity']:.2f} | {row['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
