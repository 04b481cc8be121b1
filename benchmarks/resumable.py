"""The protocol of the quality benchmarks, and their results file, from which an interrupted benchmark continues."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from lit_prune.calibration.cached_statistics import CachedStatistics
from lit_prune.calibration.windows import Batch, batches_of
from lit_prune.data.datamodule import TextDataModule
from lit_prune.evaluation.perplexity import measure
from lit_prune.evaluation.sizes import parameters
from lit_prune.files import atomic_write
from lit_prune.models.load import load_model
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe

Row = dict[str, Any]


@dataclass
class Protocol:
    """The model, the calibration text and the validation text of a benchmark.

    Args:
        pretrained: Hub id, folder, .gguf file or `embedded`.
        train_files: Text files for calibration; null uses Python's documentation.
        val_files: Text files for the perplexity.
        num_samples: Number of calibration windows (seed 0).
        seq_length: Tokens per calibration window.
        val_windows: Number of validation windows, taken from the start of the text.
        val_length: Tokens per validation window.
        matmul_precision: `medium` multiplies float32 matrices in bfloat16 while a model is scored and pruned, in half
            of the time on a processor that can; perplexity is measured in float32 all the same.
        precision: Precision of training. `32-true` is much faster on a processor without bfloat16 instructions.
    """

    pretrained: str = "embedded"
    train_files: str | None = None
    val_files: str | None = None
    num_samples: int = 32
    seq_length: int = 1024
    val_windows: int = 12
    val_length: int = 2048
    matmul_precision: Literal["highest", "medium"] = "highest"
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"

    def __post_init__(self) -> None:
        self.data = TextDataModule(
            self.pretrained,
            train_files=self.train_files,
            val_files=self.val_files,
            seq_length=self.val_length,
            batch_size=1,
            val_windows=self.val_windows,
        )
        self._batches: list[Batch] = []

    def batches(self) -> list[Batch]:
        """Returns the calibration batches, one window each."""
        if not self._batches:
            self._batches = batches_of(self.data.calibration_windows(self.num_samples, self.seq_length, seed=0), 1)
        return self._batches

    @contextmanager
    def products(self) -> Iterator[None]:
        """Multiplies matrices in the chosen precision for as long as the context lasts."""
        torch.set_float32_matmul_precision(self.matmul_precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")

    def run(self, recipe: Recipe | None, stored: CachedStatistics | None = None) -> Row:
        """Returns the row of one recipe on a fresh copy of the model, or of the dense model for None."""
        model = load_model(self.pretrained, "float32")
        with self.products():
            pruned = None if recipe is None else prune(model, self.batches(), recipe, statistics=stored)
        measured = measure(model, self.data.val_dataloader(), self.data.describe("val"))
        return {
            "perplexity": measured.perplexity,
            "parameters": parameters(model),
            "sparsity": 0.0 if pruned is None else pruned.sparsity,
            "seconds": 0.0 if pruned is None else sum(pruned.seconds.values()),
            "search": {} if pruned is None else pruned.search,
            "sizes": getattr(model.config, "slice_sizes", None),
            "protocol": asdict(measured.protocol),
        }


class Results:
    """A file with one JSON object per case; a case that it contains is not run again."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def remove(self, unwanted: Callable[[Row], bool]) -> None:
        """Removes rows from the file, so that their cases are run again."""
        self.rows = [row for row in self.rows if not unwanted(row)]
        with atomic_write(self.path) as draft:
            draft.write_text("".join(f"{json.dumps(row)}\n" for row in self.rows))

    def once(self, case: str, run: Callable[[], Row]) -> Row:
        """Returns the row of ``case`` from the file, or runs it and appends its row."""
        for row in self.rows:
            if row["case"] == case:
                return row
        print(f"{len(self.rows) + 1}: {case}", file=sys.stderr)
        row = {"case": case} | run()
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


class MatchingCases:
    """Runs the cases that are missing from the results file and match a pattern.

    Args:
        protocol: The model and the texts.
        results: The results file.
        pattern: Regular expression of the names of the cases to run.
    """

    def __init__(self, protocol: Protocol, results: Results, pattern: str) -> None:
        self.protocol, self.results, self.pattern = protocol, results, re.compile(pattern)

    def once(self, case: str, run: Callable[[], Row]) -> None:
        """Runs a case unless its name does not match or it is in the file."""
        if self.pattern.search(case):
            self.results.once(case, run)


def arguments(description: str | None, results: str, **defaults: Any) -> tuple[Protocol, Results]:
    """Returns the protocol and the results file given on the command line.

    Args:
        description: Text of `--help`.
        results: Default of `--results`.
        defaults: Other defaults for fields of the protocol.
    """
    parser = ArgumentParser(description=description)
    parser.add_class_arguments(Protocol, as_group=False)
    parser.add_argument("--results", default=results, help="Results file, one JSON object per line.")
    parser.set_defaults(defaults)
    settings = parser.parse_args()
    rows = Results(settings.pop("results"))
    return Protocol(**settings.as_dict()), rows
