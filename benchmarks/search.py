"""Gain of searches over their initial rates, with every loss and level.

    python benchmarks/search.py
    python benchmarks/search.py --method SparseGPT --start Uniform --sparsity 0.7 --evaluations 200 --seeds 1
    python benchmarks/search.py --pretrained FOLDER --train_files TEXT --val_files RAW --num_samples 16 \\
        --seq_length 1024 --val_windows 6 --val_length 2048 --sparsity 0.7 --method SparseGPT --start LayerRedundancy \\
        --seeds 1 --cases "blocks, kl" --evaluations 1000 --results FILE.jsonl

`--cases` is a regular expression of the names of the cases to run. With `--plan FILE` searches start from a plan that
another search has found, on the windows of other seeds; give such a run a results file of its own. The results file has
one JSON object per case. The state of every search is stored beside it, so that an interrupted benchmark continues. F
is the CPU time of a case in multiples of one plain forward pass of the calibration windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from forwards import cost, forward_seconds
from jsonargparse import ArgumentParser
from resumable import MatchingCases, Protocol, Results, Row

from lit_prune import allocate, pruning
from lit_prune.allocate import Allocation, Arithmetic, Plan, Search, Uniform
from lit_prune.models.load import load_model
from lit_prune.recipe import Recipe


def cases(
    start: Allocation, evaluations: int, tokens: int, seeds: int, results: Results
) -> Iterator[tuple[str, Allocation]]:
    """Yields the name and the allocation of every case."""
    for rule in dict.fromkeys([Uniform(), start, Arithmetic()]):
        yield type(rule).__name__, rule
    levels = [level for level in ("blocks", "linears") if start.levels & {"blocks", level}]
    for level in levels:
        for loss in ("cross_entropy", "kl"):
            for seed in range(seeds):
                state = str(results.path.with_suffix(f".{level}-{loss}{seed}.json"))
                settings: dict[str, Any] = {
                    "level": level,
                    "loss": loss,
                    "tokens": tokens,
                    "seed": seed,
                    "state": state,
                }
                search = Search(start, evaluations, **settings)
                yield f"Search, {level}, {loss}, seed {seed}", search


class Cases(MatchingCases):
    """The cases of searches, with the number of evaluations and the cost."""

    def run(self, recipe: Recipe) -> Row:
        """Returns the row of a recipe, run between two plain forward passes."""
        before = self.forward_seconds()
        with cost() as spent:
            row = self.protocol.run(recipe)
        cost_of_pass = (before + self.forward_seconds()) / 2
        return row | {
            "multiple": spent.cpu_seconds / cost_of_pass,
            "matmul_precision": self.protocol.matmul_precision,
        }

    def forward_seconds(self) -> float:
        """Returns the CPU seconds of a plain forward pass of all windows through the dense model."""
        with self.protocol.products():
            return forward_seconds(load_model(self.protocol.pretrained, "float32"), self.protocol.batches())


def main() -> None:
    """Runs the missing cases and prints all of them as a table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(Protocol, as_group=False)
    parser.add_argument("--results", default="runs/search.jsonl", help="Results file, one JSON object per line.")
    parser.add_argument("--cases", default="", help="Regular expression of the names of the cases to run.")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--evaluations", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=256, help="Tokens of a window that kl compares.")
    parser.add_argument("--minutes", type=float, default=None, help="Time limit of every search; null is no limit.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", default="Wanda", help="Name of the mask method.")
    parser.add_argument("--start", default="DLP", help="Name of the allocation of the initial rates.")
    parser.add_argument("--plan", default=None, help="Plan with the initial rates, of another search, instead.")
    parser.set_defaults(num_samples=16, seq_length=256, val_windows=24, val_length=256)
    settings = parser.parse_args()
    results, sparsity = Results(settings.pop("results")), settings.pop("sparsity")
    evaluations, tokens = settings.pop("evaluations"), settings.pop("tokens")
    seeds, minutes = settings.pop("seeds"), settings.pop("minutes")
    method, start = getattr(pruning, settings.pop("method"))(), getattr(allocate, settings.pop("start"))()
    plan, pattern = settings.pop("plan"), settings.pop("cases")
    start = start if plan is None else Plan(plan)
    runner = Cases(Protocol(**settings.as_dict()), results, pattern)
    for name, allocation in cases(start, evaluations, tokens, seeds, results):
        if isinstance(allocation, Search):
            allocation = replace(allocation, minutes=minutes)
        runner.once(name, partial(runner.run, Recipe(method, sparsity, allocation)))
    print("| case | perplexity | evaluations | F |\n| --- | ---: | ---: | ---: |")
    for row in results.rows:
        evaluated = row["search"].get("evaluations", "")
        print(f"| {row['case']} | {row['perplexity']:.2f} | {evaluated} | {row['multiple']:.1f} |")


if __name__ == "__main__":
    main()
