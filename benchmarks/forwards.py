"""Scoring and pruning, or slicing, against one plain forward of the same windows, and against the work by the book.

    python benchmarks/forwards.py --pretrained FOLDER --train_files TEXT --val_files RAW
    python benchmarks/forwards.py --num_samples 16 --seq_length 256      # the embedded model

Prints, for every piece of work, seconds as a multiple of F (one plain forward of the windows through the decoder,
without the head; the mean of one before and one after) beside the number of forwards that must be done, and the peak
of the memory (Linux, glibc) above what the process held when the work began, beside the size of the stored activations.
Beside it the same of `reference.py`, one linear at a time as the papers go, the share of zeros that the masks of both
have in common, and, with `--val_files`, both perplexities. All in one process, one after the other.
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
import reference
import torch
from jsonargparse import auto_cli
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, LayerRedundancy, Uniform
from lit_prune.calibration.windows import Batch, batches_of
from lit_prune.data.datamodule import TextDataModule
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.families import find_blocks
from lit_prune.models.load import load_model
from lit_prune.pipeline import prune
from lit_prune.prune import Magnitude, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.slice import Slicing


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        recipe: What is done.
        floor: The number of forwards that must be done for it.
        by_the_book: The method in reference.py that gives the same masks, where there is one.
    """

    recipe: Recipe
    floor: int
    by_the_book: reference.Name | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        method = self.recipe.method
        how = f" ({method.propagate})" if isinstance(method, (Wanda, SparseGPT)) else ""
        return f"{type(method).__name__}{how} + {type(self.recipe.allocation).__name__}"


WORK = [
    Work(Recipe(Magnitude(), 0.5, Uniform()), 0, "Magnitude"),
    Work(Recipe(Magnitude(), 0.5, DLP()), 1, "Magnitude"),
    Work(Recipe(Wanda(propagate="dense"), 0.5, Uniform()), 1),
    Work(Recipe(Wanda(propagate="dense"), 0.5, DLP()), 1),
    Work(Recipe(Wanda(propagate="pruned"), 0.5, Uniform()), 2, "Wanda"),
    Work(Recipe(Wanda(propagate="pruned"), 0.5, DLP()), 3, "Wanda"),
    Work(Recipe(SparseGPT(propagate="dense"), 0.5, DLP()), 1),
    Work(Recipe(SparseGPT(propagate="pruned"), 0.5, Uniform()), 2, "SparseGPT"),
    Work(Recipe(SparseGPT(propagate="pruned"), 0.5, DLP()), 3, "SparseGPT"),
    Work(Recipe(Slicing(), 0.25, Uniform()), 1),
    Work(Recipe(Slicing(), 0.25, LayerRedundancy()), 2),
]


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


def agreement(one: nn.Module, other: nn.Module) -> float:
    """Returns of how many of the weights that one of both has pruned the other has, too, as a share."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    both = sum(int(((a == 0) & (b == 0)).sum()) for a, b in pairs)
    return both / max(sum(int(((a == 0) | (b == 0)).sum()) for a, b in pairs), 1)


def by_block(one: PreTrainedModel, other: PreTrainedModel) -> str:
    """Returns :func:`agreement` in the first block, in the last, and in all."""
    first, *_, last = zip(find_blocks(one), find_blocks(other), strict=True)
    ends = (agreement(a.module, b.module) for a, b in (first, last))
    return " / ".join(f"{share:.4%}" for share in (*ends, agreement(one, other)))


class Bench:
    """Does pieces of work on copies of one model, between plain forwards."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: list[Batch],
        validation: tuple[DataLoader, str] | None,
        *,
        itself: bool = False,
    ) -> None:
        self.model, self.batches, self.validation, self.itself = model, batches, validation, itself

    def timed(self, work: Callable[[PreTrainedModel], object]) -> tuple[PreTrainedModel, list[str]]:
        """Returns what ``work`` made of a copy of the model, and the cells that tell its cost and its perplexity."""
        candidate = copy.deepcopy(self.model)
        before = measured(lambda: forward(self.model, self.batches))
        found = measured(lambda: work(candidate))
        after = measured(lambda: forward(self.model, self.batches))
        plain = (before.seconds + after.seconds) / 2
        cells = [f"{found.seconds / plain:.2f}", f"{found.peak_bytes / 1e6:.0f}"]
        if self.validation is not None:
            cells.append(f"{measure(candidate, *self.validation).perplexity:.2f}")
        return candidate, cells

    def row(self, work: Work) -> list[str]:
        """Returns one row of the table."""
        ours, cells = self.timed(lambda model: prune(model, self.batches, work.recipe))
        row = [work.name, str(work.floor), *cells]
        if work.by_the_book is None:
            return row
        sparsity, dlp = work.recipe.sparsity, isinstance(work.recipe.allocation, DLP)

        def book(batches: list[Batch]) -> Callable[[PreTrainedModel], object]:
            return lambda model: reference.prune(model, batches, work.by_the_book, sparsity, dlp=dlp)  # type: ignore[arg-type]

        theirs, cells = self.timed(book(self.batches))
        row += [*cells, by_block(ours, theirs)]
        if self.itself:
            again, _ = self.timed(book(self.batches[::-1]))
            row.append(by_block(theirs, again))
        return row


def main(
    pretrained: str = "embedded",
    train_files: str | None = None,
    val_files: str | None = None,
    num_samples: int = 32,
    seq_length: int = 1024,
    batch_size: int = 1,
    val_windows: int = 6,
    val_length: int = 2048,
    only: str = "",
    itself: bool = False,
) -> None:
    """Prints the table.

    Args:
        pretrained: Hub id, folder, .gguf file or `embedded`.
        train_files: Text to draw the windows from; null takes Python's documentation.
        val_files: Text whose perplexity is measured; null measures none.
        num_samples: Number of windows.
        seq_length: Tokens per window.
        batch_size: Windows per forward.
        val_windows: Validation windows, the first of the text.
        val_length: Tokens per validation window.
        only: Do only the work in whose name this stands, such as DLP.
        itself: Do the work by the book once more with the windows in reverse order, and tell how far its masks agree
            with its own: what rounding alone does.
    """
    data = TextDataModule(
        pretrained,
        train_files=train_files,
        val_files=val_files,
        seq_length=seq_length,
        val_seq_length=val_length,
        val_windows=val_windows,
        batch_size=1,
    )
    batches = batches_of(data.calibration_windows(num_samples, seq_length, seed=0), batch_size)
    model = load_model(pretrained, "float32")
    validation = None if val_files is None else (data.val_dataloader(), data.describe("val"))
    bench = Bench(model, batches, validation, itself=itself)
    forward(model, batches[:1])
    activations = num_samples * seq_length * model.config.hidden_size * 4
    told = ["perplexity"] if validation else []
    ours = ["multiple of F", "peak MB", *told]
    head = ["work", "floor", *ours, *(f"{name}, by the book" for name in ours), "same zeros: first / last / all blocks"]
    head += ["by the book, windows in reverse order"] if itself else []
    print(
        f"{num_samples} windows of {seq_length} tokens, {torch.get_num_threads()} threads; stored activations "
        f"{activations / 1e6:.0f} MB\n\n| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}"
    )
    for work in (work for work in WORK if only in work.name):
        row = bench.row(work)
        print(f"| {' | '.join(row + [''] * (len(head) - len(row)))} |", flush=True)


if __name__ == "__main__":
    auto_cli(main)
