"""Scoring and pruning, or slicing, against one plain forward of the same windows, in one process.

    python benchmarks/forwards.py --pretrained FOLDER --train_files TEXT
    python benchmarks/forwards.py --num_samples 16 --seq_length 256      # the embedded model

Prints, for every piece of work, seconds as a multiple of F (one plain forward of the windows through the decoder,
without the head; the mean of one before and one after) beside the number of forwards that must be done, and the peak
of the memory (Linux, glibc) above what the process held when the work began, beside the size of the stored activations.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, LayerRedundancy, Uniform
from lit_prune.calibrate import Batch, batches_of
from lit_prune.data import TextDataModule
from lit_prune.load import load_model
from lit_prune.pipeline import Recipe, prune
from lit_prune.prune import Wanda
from lit_prune.slice import Slicing

# What is timed, and the number of forwards that must be done for it.
WORK: dict[str, tuple[Recipe, int]] = {
    "DLP + Wanda, propagate: dense": (Recipe(Wanda(propagate="dense"), 0.5, DLP()), 1),
    "DLP + Wanda, propagate: pruned": (Recipe(Wanda(propagate="pruned"), 0.5, DLP()), 3),
    "Slicing, constant": (Recipe(Slicing(), 0.25, Uniform()), 1),
    "Slicing, LayerRedundancy": (Recipe(Slicing(), 0.25, LayerRedundancy()), 2),
}


@dataclass
class Cost:
    """Seconds, and the peak of resident memory above its start."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def cost() -> Iterator[Cost]:
    """Measures what happens in the context; memory is sampled every few milliseconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier work has freed, or this one's peak hides in it
    process, done, found = psutil.Process(), threading.Event(), Cost()
    start = process.memory_info().rss

    def sample() -> None:
        while not done.wait(0.005):
            found.peak_bytes = max(found.peak_bytes, process.memory_info().rss - start)

    sampler = threading.Thread(target=sample)
    sampler.start()
    begin = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - begin
        done.set()
        sampler.join()


@torch.no_grad()
def forward(model: PreTrainedModel, batches: list[Batch]) -> None:
    """One plain forward through the decoder, the head left out."""
    for batch in batches:
        model.base_model(**batch, use_cache=False)


def measured(work: Callable[[], object]) -> Cost:
    """Returns what ``work`` costs."""
    with cost() as found:
        work()
    return found


def main(
    pretrained: str = "embedded",
    train_files: str | None = None,
    num_samples: int = 32,
    seq_length: int = 1024,
    batch_size: int = 1,
) -> None:
    """Prints the table.

    Args:
        pretrained: Hub id, folder, .gguf file or `embedded`.
        train_files: Text to draw the windows from; null takes Python's documentation.
        num_samples: Number of windows.
        seq_length: Tokens per window.
        batch_size: Windows per forward.
    """
    data = TextDataModule(pretrained, train_files=train_files, seq_length=seq_length)
    batches = batches_of(data.calibration_windows(num_samples, seq_length, seed=0), batch_size)
    model = load_model(pretrained, "float32")
    forward(model, batches[:1])
    activations = num_samples * seq_length * model.config.hidden_size * 4
    table = Table(title=f"{num_samples} windows of {seq_length} tokens, {torch.get_num_threads()} threads")
    for column in ("work", "seconds", "multiple of F", "floor", "peak MB", "stored activations MB"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for name, (recipe, floor) in WORK.items():
        candidate = copy.deepcopy(model)
        before = measured(lambda: forward(model, batches))
        work = measured(lambda: prune(candidate, batches, recipe))  # noqa: B023
        after = measured(lambda: forward(model, batches))
        plain = (before.seconds + after.seconds) / 2
        table.add_row("plain forward", f"{plain:.1f}", "1.00", "", f"{before.peak_bytes / 1e6:.0f}", "")
        table.add_row(
            name,
            f"{work.seconds:.1f}",
            f"{work.seconds / plain:.2f}",
            str(floor),
            f"{work.peak_bytes / 1e6:.0f}",
            f"{activations / 1e6:.0f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    auto_cli(main)
