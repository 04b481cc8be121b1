"""Constant against dynamic slicing, at the same mean slice and at the same size.

    python benchmarks/slices.py --pretrained FOLDER --train_files TEXT --val_files RAW --results FILE.jsonl

The results file has one JSON object per case, and an interrupted benchmark continues. The scores of each allocation
are computed once; every case is sliced by a plan made from them. The width of the first block is also the width of the
embedding, so that at the same mean an allocation that spares the first block leaves a larger model. At the same size a
dynamic allocation is therefore sliced more, until it has as many parameters as the constant slice.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import tables
from resumable import Protocol, Results, Row, arguments

from lit_prune.allocate import DLP, Allocation, LayerRedundancy, Plan, Uniform, allocate, write_plan
from lit_prune.models.load import load_config, load_model
from lit_prune.pipeline import score
from lit_prune.recipe import Recipe
from lit_prune.slice import Slicing, sizes_from_rates, sliced_parameters

MEANS = (0.20, 0.25, 0.30)
PATTERNS = ("LayerRedundancy, base 0.05 below", "LayerRedundancy, base 0.10 below", "DLP")


def rule(pattern: str, mean: float) -> Allocation:
    """Returns the allocation of a pattern at a mean slice."""
    if pattern == "constant":
        return Uniform()
    return DLP() if pattern == "DLP" else LayerRedundancy(round(mean - float(pattern.split()[2]), 3))


class Slices:
    """The cases of the benchmark."""

    def __init__(self, protocol: Protocol, results: Results) -> None:
        self.protocol, self.results = protocol, results
        self.config = load_config(protocol.pretrained)

    def scores(self, pattern: str) -> list[float]:
        """Returns the score of every block, computed once for each allocation."""
        if pattern == "constant":
            return [1.0] * self.config.num_hidden_layers
        allocation = rule(pattern, MEANS[0])

        def run() -> Row:
            model = load_model(self.protocol.pretrained, "float32")
            scored = score(model, self.protocol.batches(), Recipe(Slicing(), MEANS[0], allocation))
            return {"scores": scored.scores, "seconds": scored.seconds}

        return self.results.once(f"scores of {type(allocation).__name__}", run)["scores"]

    def rates(self, pattern: str, mean: float) -> list[float]:
        """Returns the slice of every block."""
        scores = self.scores(pattern)
        return allocate(rule(pattern, mean), scores, mean, sizes=[self.config.hidden_size] * len(scores))

    def row(self, case: str, pattern: str, mean: float) -> Row:
        """Returns the row of a pattern at a mean slice."""

        def run() -> Row:
            with tempfile.TemporaryDirectory() as folder:
                plan = Path(folder) / "plan.yaml"
                write_plan(plan, self.rates(pattern, mean), self.scores(pattern), case)
                return self.protocol.run(Recipe(Slicing(), mean, Plan(str(plan))))

        return self.results.once(case, run)

    def at_size(self, pattern: str, parameters: int) -> float:
        """Returns the smallest mean slice, in steps of 0.001, that leaves at most ``parameters`` parameters."""
        full, mean = self.config.hidden_size, MEANS[0]
        while True:
            sizes = sizes_from_rates(self.rates(pattern, mean), full, Slicing().multiple)
            if sliced_parameters(self.config, [*sizes, full]) <= parameters:
                return mean
            mean = round(mean + 0.001, 3)

    def rows(self) -> list[Row]:
        """Returns all rows, in the order of the table."""
        rows = [self.results.once("dense", partial(self.protocol.run, None))]
        for mean in MEANS:
            constant = self.row(f"constant, {mean:.2f}", "constant", mean)
            rows += [constant, *(self.row(f"{pattern}, {mean:.2f}", pattern, mean) for pattern in PATTERNS)]
            for pattern in PATTERNS:
                case = f"{pattern}, size of constant {mean:.2f}"
                rows.append(self.row(case, pattern, self.at_size(pattern, constant["parameters"])))
        return rows


def main() -> None:
    """Runs the missing cases and prints the tables."""
    protocol, results = arguments(__doc__, "runs/slices.jsonl", num_samples=16, val_windows=6)
    rows = Slices(protocol, results).rows()
    print(f"\n{rows[0]['protocol']}\n\n{tables.equal_mean(rows)}\n{tables.equal_size(rows)}")


if __name__ == "__main__":
    main()
