"""Time and memory of scoring and pruning, or slicing, against a plain forward pass and a reference implementation.

    python benchmarks/forwards.py --pretrained FOLDER --train_files TEXT --val_files RAW
    python benchmarks/forwards.py --num_samples 16 --seq_length 256      # the embedded model

For every job the table has the time as a multiple of F (one plain forward pass of the windows through the decoder,
without the head; the mean of one pass before and one after the job), the smallest number of forward passes that the
job needs, and the peak memory (Linux, glibc) above that of the process when the job began; the size of the stored
activations is printed above the table. The same follows for `reference.py`, which prunes one linear at a time as the
papers describe it, with the share of zeros that both masks have in common and, with `--val_files`, both perplexities.
All jobs run in one process, one after the other.
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
from lit_prune.pruning import Magnitude, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.shrink import MLPWidth
from lit_prune.slice import Slicing


@dataclass(frozen=True)
class Job:
    """A job to time.

    Attributes:
        recipe: The recipe of the pruning.
        minimum: The smallest number of forward passes that it needs.
        reference: The method in reference.py that gives the same masks, if there is one.
    """

    recipe: Recipe
    minimum: int
    reference: reference.Name | None = None

    @property
    def name(self) -> str:
        """The name in the table."""
        method = self.recipe.method
        how = f" ({method.propagate})" if isinstance(method, (Wanda, SparseGPT)) else ""
        return f"{type(method).__name__}{how} + {type(self.recipe.allocation).__name__}"


JOBS = [
    Job(Recipe(Magnitude(), 0.5, Uniform()), 0, "Magnitude"),
    Job(Recipe(Magnitude(), 0.5, DLP()), 1, "Magnitude"),
    Job(Recipe(Wanda(propagate="dense"), 0.5, Uniform()), 1),
    Job(Recipe(Wanda(propagate="dense"), 0.5, DLP()), 1),
    Job(Recipe(Wanda(propagate="pruned"), 0.5, Uniform()), 2, "Wanda"),
    Job(Recipe(Wanda(propagate="pruned"), 0.5, DLP()), 3, "Wanda"),
    Job(Recipe(SparseGPT(propagate="dense"), 0.5, DLP()), 1),
    Job(Recipe(SparseGPT(propagate="pruned"), 0.5, Uniform()), 2, "SparseGPT"),
    Job(Recipe(SparseGPT(propagate="pruned"), 0.5, DLP()), 3, "SparseGPT"),
    Job(Recipe(Slicing(), 0.25, Uniform()), 1),
    Job(Recipe(Slicing(), 0.25, LayerRedundancy()), 2),
    Job(Recipe(MLPWidth(), 0.25, Uniform()), 2),
    Job(Recipe(MLPWidth(), 0.25, LayerRedundancy()), 3),
]


@dataclass
class Cost:
    """Seconds, CPU seconds, and the peak of resident memory above the value at the start."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def cost() -> Iterator[Cost]:
    """Measures the body of the context; memory is sampled every few milliseconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # return freed memory to the system, or a peak below that of earlier jobs stays hidden
    process, done, measured_cost = psutil.Process(), threading.Event(), Cost()
    start = process.memory_info().rss

    def sample() -> None:
        while not done.wait(0.005):
            measured_cost.peak_bytes = max(measured_cost.peak_bytes, process.memory_info().rss - start)

    sampler = threading.Thread(target=sample)
    sampler.start()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    try:
        yield measured_cost
    finally:
        measured_cost.seconds = time.perf_counter() - begin
        measured_cost.cpu_seconds = time.process_time() - cpu_begin
        done.set()
        sampler.join()


@torch.no_grad()
def forward(model: PreTrainedModel, batches: list[Batch]) -> None:
    """Runs one plain forward pass through the decoder, without the head."""
    for batch in batches:
        model.base_model(**batch, use_cache=False)


def cost_of(work: Callable[[], object]) -> Cost:
    """Returns the cost of a call of ``work``."""
    with cost() as measured_cost:
        work()
    return measured_cost


def forward_seconds(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Returns the CPU seconds of a plain forward pass of all ``batches``, from a quarter of them, but at most four."""
    some = batches[: min(max(len(batches) // 4, 1), 4)]
    return cost_of(lambda: forward(model, some)).cpu_seconds * len(batches) / len(some)


def agreement(one: nn.Module, other: nn.Module) -> float:
    """Returns the number of weights that both models pruned, as a share of those that at least one of them pruned."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    both = sum(int(((a == 0) & (b == 0)).sum()) for a, b in pairs)
    return both / max(sum(int(((a == 0) | (b == 0)).sum()) for a, b in pairs), 1)


def by_block(one: PreTrainedModel, other: PreTrainedModel) -> str:
    """Returns :func:`agreement` in the first block, the last block and the whole model, as text."""
    first, *_, last = zip(find_blocks(one), find_blocks(other), strict=True)
    ends = (agreement(a.module, b.module) for a, b in (first, last))
    return " / ".join(f"{share:.4%}" for share in (*ends, agreement(one, other)))


class Bench:
    """Runs jobs on copies of one model, each between two plain forward passes."""

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
        """Returns a copy of the model after ``work``, and the table cells with the cost and the perplexity."""
        candidate = copy.deepcopy(self.model)
        before = cost_of(lambda: forward(self.model, self.batches))
        job_cost = cost_of(lambda: work(candidate))
        after = cost_of(lambda: forward(self.model, self.batches))
        plain = (before.seconds + after.seconds) / 2
        cells = [f"{job_cost.seconds / plain:.2f}", f"{job_cost.peak_bytes / 1e6:.0f}"]
        if self.validation is not None:
            cells.append(f"{measure(candidate, *self.validation).perplexity:.2f}")
        return candidate, cells

    def row(self, job: Job) -> list[str]:
        """Returns one row of the table."""
        ours, cells = self.timed(lambda model: prune(model, self.batches, job.recipe))
        row = [job.name, str(job.minimum), *cells]
        if job.reference is None:
            return row
        sparsity, dlp = job.recipe.sparsity, isinstance(job.recipe.allocation, DLP)

        def by_reference(batches: list[Batch]) -> Callable[[PreTrainedModel], object]:
            return lambda model: reference.prune(model, batches, job.reference, sparsity, dlp=dlp)  # type: ignore[arg-type]

        theirs, cells = self.timed(by_reference(self.batches))
        row += [*cells, by_block(ours, theirs)]
        if self.itself:
            again, _ = self.timed(by_reference(self.batches[::-1]))
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
        train_files: Text files to draw the windows from; null uses Python's documentation.
        val_files: Text files to measure the perplexity on; null skips the measurement.
        num_samples: Number of windows.
        seq_length: Tokens per window.
        batch_size: Windows per forward.
        val_windows: Number of validation windows, taken from the start of the text.
        val_length: Tokens per validation window.
        only: Run only the jobs whose name contains this text, such as DLP.
        itself: Run the reference once more with the windows in reverse order, and print how far its two masks agree,
            which shows the effect of rounding alone.
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
    columns = ["multiple of F", "peak MB", *(["perplexity"] if validation else [])]
    head = ["job", "minimum", *columns, *(f"{name}, reference" for name in columns)]
    head += ["same zeros: first / last / all blocks"]
    head += ["reference, windows in order and reversed"] if itself else []
    print(
        f"{num_samples} windows of {seq_length} tokens, {torch.get_num_threads()} threads; stored activations "
        f"{activations / 1e6:.0f} MB\n\n| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}"
    )
    for job in (job for job in JOBS if only in job.name):
        row = bench.row(job)
        print(f"| {' | '.join(row + [''] * (len(head) - len(row)))} |", flush=True)


if __name__ == "__main__":
    auto_cli(main)
