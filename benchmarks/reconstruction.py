"""Perplexity, cost and memory of every mask method with and without reconstruction, and what builds on it.

    python benchmarks/reconstruction.py --pretrained FOLDER --train_files TEXT --val_files RAW
    python benchmarks/reconstruction.py --pretrained FOLDER --train_files TEXT --val_files RAW --cases "SparseGPT, 0.7"
    python benchmarks/reconstruction.py --num_samples 8 --seq_length 256 --val_length 256   # the embedded model

Cases come in the order of their importance; `--cases` is a regular expression of those to run. The results file
(--results) has one JSON object per case; cases that it contains are not run again. `multiple` is the CPU time of
scoring, pruning and reconstruction in multiples of F, one plain forward pass of the windows through the decoder,
and `peak_bytes` the peak of resident memory above that of the process when the case began. Perplexity is measured on
the given text, and on Python's documentation (validation documents), which is another kind of text than the one that
the blocks were reconstructed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import recoveries
import tables
from forwards import cost, forward_seconds
from jsonargparse import ArgumentParser
from resumable import MatchingCases, Protocol, Results, Row
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, OWL, Allocation, LayerRedundancy, Plan, Search, Uniform
from lit_prune.calibration.windows import Batch, batches_of
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.load import load_model
from lit_prune.pipeline import prune
from lit_prune.pruning import ADMM, NofM, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct

METHODS = (SparseGPT, ADMM, Wanda)
SHARES = (0.7, "2:4", 0.5, 0.6)
RECOVERIES = {"FullFineTuning": ["--model.lr=1e-4"], "MaskedLoRA": ["--pruning.recovery.r=16"]}


def cut_cases(windows: int) -> Iterator[tuple[str, Recipe]]:
    """Yields every method and share, with and without reconstruction; the most important ones first."""
    for kind in METHODS:
        for share in SHARES:
            pattern, allocation = (NofM(2, 4), Uniform()) if share == "2:4" else (None, LayerRedundancy())
            recipe = Recipe(kind(pattern), 0.5 if share == "2:4" else float(share), allocation)
            name = f"{kind.__name__}, {share}, {windows} windows"
            yield f"{name}, reconstructed", replace(recipe, reconstruction=Reconstruct())
            yield name, recipe


def allocation_cases(windows: int, folder: Path, plan: str | None) -> Iterator[tuple[str, Recipe]]:
    """Yields SparseGPT at 0.7 with reconstruction under every other allocation; the search starts from the best."""
    search = Search(LayerRedundancy(), 540, level="linears", state=str(folder / "search.json"))
    searched = search if plan is None else Plan(plan)
    rules: dict[str, Allocation] = {"Uniform": Uniform(), "DLP": DLP(), "OWL": OWL(), "Search": searched}
    for rule, allocation in rules.items():
        name = f"SparseGPT by {rule}, 0.7, {windows} windows, reconstructed"
        yield name, Recipe(SparseGPT(), 0.7, allocation, reconstruction=Reconstruct())


class Cases(MatchingCases):
    """The cases of reconstruction, see :class:`MatchingCases`; perplexity is measured on two texts."""

    def __init__(self, protocol: Protocol, results: Results, pattern: str) -> None:
        super().__init__(protocol, results, pattern)
        other = replace(protocol, train_files=None, val_files=None)
        self.texts = {"perplexity": protocol.data, "python_docs": other.data}

    def measured(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns the perplexity of ``model`` on both texts."""
        return {name: measure(model, *_validation(data)).perplexity for name, data in self.texts.items()}

    def batches(self, windows: int) -> list[Batch]:
        """Returns that many calibration windows, a batch each."""
        return batches_of(self.protocol.data.calibration_windows(windows, self.protocol.seq_length, seed=0), 1)

    def dense(self) -> Row:
        """Returns the row of the dense model."""
        return self.measured(load_model(self.protocol.pretrained, "float32"))

    def cut(self, recipe: Recipe, windows: int) -> Row:
        """Returns the row of a recipe, run between two plain forward passes."""
        model, batches = load_model(self.protocol.pretrained, "float32"), self.batches(windows)
        with self.protocol.products():
            before = forward_seconds(model, batches)
            with cost() as spent:
                pruned = prune(model, batches, recipe)
            after = forward_seconds(model, batches)
        losses = pruned.reconstruction
        return self.measured(model) | {
            "sparsity": pruned.sparsity,
            "seconds": spent.seconds,
            "multiple": 2 * spent.cpu_seconds / (before + after),
            "peak_bytes": spent.peak_bytes,
            "losses": [[block.held_out_before, block.held_out_after] for block in losses],
            "rejected": [index for index, block in enumerate(losses) if not block.kept],
            "matmul_precision": self.protocol.matmul_precision,
        }

    def recovered(self, recovery: str, sparsity: float, folder: Path) -> Row:
        """Returns the row of a fit with ADMM and reconstruction, as in recoveries.py; all share the trained blocks."""
        options = [
            "--pruning.method=ADMM",
            "--pruning.allocation=LayerRedundancy",
            f"--pruning.sparsity={sparsity}",
            f"--pruning.reconstruction.epochs={Reconstruct().epochs}",
            f"--pruning.reconstruction.state={folder / f'reconstructed-{sparsity}'}",
            f"--pruning.recovery={recovery}",
            *RECOVERIES[recovery],
        ]
        return recoveries.fit_by(self.protocol, options, folder / f"{recovery}-{sparsity}")

    def run(self, plan: str | None) -> None:
        """Runs the cases in the order of their importance; a ``plan`` takes the place of the search."""
        folder, windows = self.results.path.parent, self.protocol.num_samples
        self.once("dense", self.dense)
        self._cuts(cut_cases(windows), windows)
        for recovery in RECOVERIES:
            for sparsity in (0.5, 0.6):
                case = f"{recovery}, {sparsity}, from the reconstructed model"
                self.once(case, partial(self.recovered, recovery, sparsity, folder))
        self._cuts(allocation_cases(windows, folder, plan), windows)
        self._cuts(cut_cases(2 * windows), 2 * windows)

    def _cuts(self, cases: Iterator[tuple[str, Recipe]], windows: int) -> None:
        for case, recipe in cases:
            self.once(case, partial(self.cut, recipe, windows))


def _validation(data: Any) -> tuple[DataLoader[Any], str]:
    return data.val_dataloader(), data.describe("val")


def main() -> None:
    """Runs the missing cases and prints the tables."""
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(Protocol, as_group=False)
    parser.add_argument("--results", default="runs/reconstruction/results.jsonl", help="Results file.")
    parser.add_argument("--cases", default="", help="Regular expression of the names of the cases to run.")
    parser.add_argument("--plan", default=None, help="Plan with the rates of a search, instead of the search itself.")
    parser.set_defaults(num_samples=16, val_windows=6)
    settings = parser.parse_args()
    results, pattern, plan = Results(settings.pop("results")), settings.pop("cases"), settings.pop("plan")
    Cases(Protocol(**settings.as_dict()), results, pattern).run(plan)
    for name in ("reconstruction", "reconstruction allocations", "reconstruction recoveries"):
        print(tables.TABLES[name][1](results.rows))


if __name__ == "__main__":
    main()
