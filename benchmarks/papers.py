"""The papers' comparison on one model: methods x allocations x sparsities, patterns, both ways of propagating, search.

    python benchmarks/papers.py --pretrained FOLDER --train_files TEXT --val_files RAW

Statistics are taken once and kept beside the results (see --results), a file of JSON lines of which every line is one
case; what is in it is not run again. Seconds are those of scoring and pruning after that one look, evaluation left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import tables
from resumable import Protocol, Results, Row, arguments
from rich.progress import track

from lit_prune.allocate import DLP, OWL, Allocation, AlphaPruning, LayerRedundancy, Search, Uniform
from lit_prune.calibration.cached_statistics import CachedStatistics, read_statistics, write_statistics
from lit_prune.files import written_aside
from lit_prune.models.load import load_model
from lit_prune.pipeline import score_with_statistics
from lit_prune.prune import Magnitude, MixedNofM, NofM, SparseGPT, Wanda
from lit_prune.recipe import Recipe

Method = Magnitude | Wanda | SparseGPT
ALLOCATIONS: Sequence[Allocation] = (Uniform(), OWL(), AlphaPruning(), DLP(), LayerRedundancy())
SPARSITIES = (0.7, 0.5)


def method_cases() -> Iterator[tuple[str, Recipe]]:
    """Yields a name and a recipe for every method, allocation and sparsity."""
    for method in (Wanda(), Magnitude(), SparseGPT()):
        for sparsity in SPARSITIES:
            for allocation in ALLOCATIONS:
                yield _name(method, allocation, sparsity), Recipe(method, sparsity, allocation)


def pattern_cases() -> Iterator[tuple[str, Recipe]]:
    """Yields 2:4, 4:8 and the mixed N:8 of the allocations that pick N, all at one half."""
    for kind in (Wanda, Magnitude, SparseGPT):
        for pattern in (NofM(2, 4), NofM(4, 8)):
            yield f"{kind.__name__}, {pattern.n}:{pattern.m}", Recipe(kind(pattern), 0.5, Uniform())
        for allocation in (OWL(), DLP()):
            yield f"{kind.__name__}, N:8 by {type(allocation).__name__}", Recipe(kind(MixedNofM(8)), 0.5, allocation)


def propagate_cases() -> Iterator[tuple[str, Recipe]]:
    """Yields both ways of propagating; those that are a method's default are cases of the first table."""
    for kind in (Wanda, SparseGPT):
        for sparsity in SPARSITIES:
            for allocation in (Uniform(), DLP()):
                for propagate in ("dense", "pruned"):
                    method: Method = kind(propagate=propagate)  # type: ignore[arg-type]
                    yield _name(method, allocation, sparsity), Recipe(method, sparsity, allocation)


def search_cases(rows: Sequence[Row], folder: Path) -> Iterator[tuple[str, Recipe]]:
    """Yields, for Wanda and SparseGPT at the greatest sparsity, a search that starts from their best allocation.

    SparseGPT's levels are costly, two seconds each where Wanda's take a tenth of one; it gets fewer evaluations.
    """
    found = {row["case"]: row["perplexity"] for row in rows}
    for method, evaluations in ((Wanda(), 200), (SparseGPT(), 80)):
        best = min(ALLOCATIONS, key=lambda allocation: found[_name(method, allocation, SPARSITIES[0])])
        state = str(folder / f"search-{type(method).__name__}.json")
        name = f"{type(method).__name__}, Search from {type(best).__name__}, {SPARSITIES[0]}"
        yield name, Recipe(method, SPARSITIES[0], Search(best, evaluations=evaluations, state=state))


def _name(method: Method, allocation: Allocation, sparsity: float) -> str:
    default = method.propagate == type(method)().propagate
    how = "" if default else f" (propagate: {method.propagate})"
    return f"{type(method).__name__}{how}, {type(allocation).__name__}, {sparsity}"


class Cases:
    """Runs the cases that the results file has not, all from one look at the model."""

    def __init__(self, protocol: Protocol, results: Results) -> None:
        self.protocol, self.results = protocol, results
        self.file = results.path.with_suffix(".safetensors")
        self.stored: CachedStatistics | None = None

    def run(self, recipe: Recipe) -> Row:
        """Returns the row of one recipe; its scores are kept for the next one."""
        model, batches = load_model(self.protocol.pretrained, "float32"), self.protocol.batches()
        if self.stored is None and self.file.exists():
            self.stored = read_statistics(self.file)
        rule = recipe.allocation.rule if isinstance(recipe.allocation, Search) else recipe.allocation
        looked = Recipe(SparseGPT(propagate="dense"), recipe.sparsity, rule)  # for the Gram matrices
        known = self.stored is not None and repr(rule) in self.stored.scores
        if not known:
            scored, self.stored = score_with_statistics(model, batches, looked, statistics=self.stored)
            with written_aside(self.file) as draft:
                write_statistics(draft, self.stored)
        row = self.protocol.run(recipe, self.stored)
        return row | {"look_seconds": 0.0 if known else scored.seconds}

    def rows(self, cases: Iterator[tuple[str, Recipe]]) -> list[Row]:
        """Returns the rows of ``cases``, under a progress bar."""
        return [self.results.once(name, partial(self.run, recipe)) for name, recipe in track(list(cases), "Cases")]


def main() -> None:
    """Runs what the results file has not, and prints the tables."""
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
