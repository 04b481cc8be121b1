"""A case: its settings, its result, its cost. What the cases are: see ``pruning`` and ``fits``.

A case runs in a process of its own, so that its peak memory is its own, and an error of CUDA ends no other case.
"""

from __future__ import annotations

import logging
import resource
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_prune.allocate import Allocation, Uniform
from lit_prune.calibration.windows import Batch, batches_of
from lit_prune.data.datamodule import TextDataModule
from lit_prune.pruning import Method
from lit_prune.recipe import Recipe

Row = dict[str, Any]


class WrongResultError(Exception):
    """A result that differs from the CPU's by more than rounding explains."""


@dataclass(frozen=True)
class Settings:
    """The model and the text of all cases.

    Args:
        pretrained: Hub id, folder or `embedded`.
        train_files: Text files for calibration and training; null uses Python's documentation.
        val_files: Text files for the perplexity.
        num_samples: Number of calibration windows.
        seq_length: Tokens per window.
        batch_size: Windows per training step.
        val_windows: Number of validation windows.
        steps: Optimizer steps of a training.
        sparsity: Share of the weights that masks remove; slices remove half of it.
        compiler: Backend of torch.compile.
    """

    pretrained: str = "embedded"
    train_files: str | None = None
    val_files: str | None = None
    num_samples: int = 32
    seq_length: int = 256
    batch_size: int = 4
    val_windows: int = 16
    steps: int = 20
    sparsity: float = 0.5
    compiler: str = "inductor"

    def data(self) -> TextDataModule:
        """Returns the text in windows."""
        return TextDataModule(
            self.pretrained,
            train_files=self.train_files,
            val_files=self.val_files,
            seq_length=self.seq_length,
            batch_size=self.batch_size,
            val_windows=self.val_windows,
        )

    def batches(self, data: TextDataModule) -> list[Batch]:
        """Returns the calibration batches."""
        return batches_of(data.calibration_windows(self.num_samples, self.seq_length, seed=0), self.batch_size)

    def recipe(self, method: Method, allocation: Allocation | None = None) -> Recipe:
        """Returns a recipe, uniform by default."""
        share = self.sparsity / 2 if method.changes_shapes else self.sparsity
        return Recipe(method, share, allocation or Uniform())


class Case(ABC):
    """One check.

    Attributes:
        reference: The case whose perplexity on the CPU is expected; None if the case compares by itself.
        tolerance: Largest relative difference of the perplexities.
    """

    reference: Case | None = None
    tolerance: float = 1e-3

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in the table."""

    @abstractmethod
    def run(self, settings: Settings, device: torch.device) -> Row:
        """Returns perplexity, tokens per second and a note, as far as the case has them.

        Raises:
            WrongResultError: if the result is not the CPU's.
        """


def now(device: torch.device) -> float:
    """Returns the time in seconds, after ``device`` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """Returns the peak memory of this process on ``device``; for the CPU that is its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where a new process inherits the maximum that `resource` knows
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_case(case: Case, settings: Settings, device: torch.device) -> Row:
    """Returns the row of ``case`` on ``device``, with the peak memory and the duration."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports a cast in every 8-bit product
    begin = now(device)
    row = case.run(settings, device)
    return row | {"peak_bytes": peak_bytes(device), "seconds": round(now(device) - begin, 1)}
