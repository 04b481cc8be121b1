"""The comparison of the papers on one model: methods x allocations x sparsities, patterns, `propagate`, search.

    python benchmarks/papers.py --pretrained FOLDER --train_files TEXT --val_files RAW

The results file (--results) has one JSON object per case; cases that it contains are not run again. The statistics are
computed once and stored beside it. Seconds are those of scoring and pruning from these statistics, without evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import tables
from resumable import Protocol, Results, Row, arguments
from rich.progress import track

from lit_prune.allocate import DLP, OWL, Allocation, AlphaPruning, LayerRedundancy, Search, Uniform
from lit_prune.allocate.base import Level
from lit_prune.calibration.cached_statistics import CachedStatistics, read_statistics, write_statistics
from lit_prune.files import atomic_write
from lit_prune.models.load import load_model
from lit_prune.pipeline import score_with_statistics
from lit_prune.pruning import Magnitude, MixedNofM, NofM, SparseGPT, Wanda
from lit_prune.recipe import Recipe

Method = Magnitude | Wanda | SparseGPT
ALLOCATIONS: Sequence[Allocation] = (Uniform(), OWL(), AlphaPruning(), DLP(), LayerRedundancy())
SPARSITIES = (0.7, 0.5)
# by level, evaluations for one sweep over all blocks, and for nearly two rounds over groups of linears and single ones
SEARCHES: dict[Level, int] = {"blocks": 150, "linears": 1150}


def method_cases() -> Iterator[tuple[str, Recipe]]:
    """Yields a name and a recipe for every method, allocation and sparsity."""
    for method in (Wanda(), Magnitude(), SparseGPT()):
        for sparsity in SPARSITIES:
            for allocation in ALLOCATIONS:
                yield _name(method, allocation, sparsity), Recipe(method, sparsity, allocation)


def pattern_cases() -> Iterator[tuple[str, Recipe]]:
    """Yields 2:4, 4:8 and mixed N:8 with the allocations that choose N, all at a sparsity of one half."""
    for kind in (Wanda, Magnitude, SparseGPT):
        for pattern in (NofM(2, 4), NofM(4, 8)):
            yield f"{kind.__name__}, {pattern.n}:{pattern.m}", Recipe(kind(pattern), 0.5, Uniform())
        for allocation in (OWL(), DLP()):
            yield f"{kind.__name__}, N:8 by {type(allocation).__name__}", Recipe(kind(MixedNofM(8)), 0.5, allocation)


def propagate_cases() -> Iterator[tuple[str, Recipe]]:
    """Yields both values of `propagate`; the default of each method is a case of the first table too."""
    for kind in (Wanda, SparseGPT):
        for sparsity in SPARSITIES:
            for allocation in (Uniform(), DLP()):
                for propagate in ("dense", "pruned"):
                    method: Method = kind(propagate=propagate)  # type: ignore[arg-type]
                    yield _name(method, allocation, sparsity), Recipe(method, sparsity, allocation)


def search_cases(rows: Sequence[Row], folder: Path) -> Iterator[tuple[str, Recipe]]:
    """Yields, for SparseGPT and Wanda at the highest sparsity, searches that start from their best allocation."""
    perplexities = {row["case"]: row["perplexity"] for row in rows}
    for level, evaluations in SEARCHES.items():
        for method in (SparseGPT(), Wanda()):
            best = min(ALLOCATIONS, key=lambda allocation: perplexities[_name(method, allocation, SPARSITIES[0])])
            state = str(folder / f"search-{level}-{type(method).__name__}.json")
            name = f"{type(method).__name__}, Search of {level} from {type(best).__name__}, {SPARSITIES[0]}"
            search = Search(best, evaluations, level=level, state=state)
            yield name, Recipe(method, SPARSITIES[0], search)


def _name(method: Method, allocation: Allocation, sparsity: float) -> str:
    default = method.propagate == type(method)().propagate
    how = "" if default else f" (propagate: {method.propagate})"
    return f"{type(method).__name__}{how}, {type(allocation).__name__}, {sparsity}"


class Cases:
    """Runs the cases that are missing from the results file, all from the same statistics."""

    def __init__(self, protocol: Protocol, results: Results) -> None:
        self.protocol, self.results = protocol, results
        self.file = results.path.with_suffix(".safetensors")
        self.stored: CachedStatistics | None = None

    def run(self, recipe: Recipe) -> Row:
        """Returns the row of one recipe; its scores are stored for the following ones."""
        model, batches = load_model(self.protocol.pretrained, "float32"), self.protocol.batches()
        if self.stored is None and self.file.exists():
            self.stored = read_statistics(self.file)
        rule = recipe.allocation.rule if isinstance(recipe.allocation, Search) else recipe.allocation
        scoring = Recipe(SparseGPT(propagate="dense"), recipe.sparsity, rule)  # collects Gram matrices too
        has_scores = self.stored is not None and repr(rule) in self.stored.scores
        if not has_scores:
            scored, self.stored = score_with_statistics(model, batches, scoring, statistics=self.stored)
            with atomic_write(self.file) as draft:
                write_statistics(draft, self.stored)
        row = self.protocol.run(recipe, self.stored)
        return row | {"scoring_seconds": 0.0 if has_scores else scored.seconds}

    def rows(self, cases: Iterator[tuple[str, Recipe]]) -> list[Row]:
        """Returns the rows of ``cases``, with a progress bar."""
        return [self.results.once(name, partial(self.run, recipe)) for name, recipe in track(list(cases), "Cases")]


def main() -> None:
    """Runs the missing cases and prints the tables."""
    protocol, results = arguments(__doc__, "runs/papers/results.jsonl", num_samples=16, val_windows=6)
    cases = Cases(protocol, results)
    dense = results.once("dense", partial(protocol.run, None))
    rows = cases.rows(method_cases())
    parts = [rows, *(cases.rows(more()) for more in (pattern_cases, propagate_cases))]
    parts.append(cases.rows(search_cases(rows, results.path.parent)))
    print(f"\n{dense['protocol']}\n\ndense: {dense['perplexity']:.2f}\n")
    every = [row for part in parts for row in part]
    for name in ("methods", "patterns", "propagation", "searched"):
        print(tables.TABLES[name][1](every))
    lines = [
        [row["case"], f"{row['perplexity']:.2f}", f"{row['sparsity']:.4f}", f"{row['seconds']:.0f}"] for row in every
    ]
    print(tables.table(["case", "perplexity", "sparsity", "seconds"], lines))


if __name__ == "__main__":
    main()
