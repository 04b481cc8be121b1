"""Perplexity, speed and memory of the teachers of a distillation, at the same number of steps.

    OMP_NUM_THREADS=1 python benchmarks/teachers.py --results runs/teachers.jsonl

Every case prunes the same model in the same way (DLP + Wanda, a sparsity of 0.5) and trains MaskedLoRA of rank 16 on
the same windows in the same order (seed 0, AdamW, ten warm-up steps and a cosine). Speed is training tokens per second
of CPU time, relative to training without a teacher; the time before training has a column of its own. Bytes are those
that the teacher takes in addition to the student. An interrupted benchmark continues.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch
from resumable import Protocol, Row, arguments
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from lit_prune.calibration.windows import Batch
from lit_prune.data.datamodule import TextDataModule
from lit_prune.distill import Copy, DenseModel, Distillation, DistillationHook, SparseDelta, Student, TopK
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.load import load_model
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import MaskedLoRA

STEPS, BATCH, LR = 60, 8, 2e-3


def training_batches(protocol: Protocol) -> Iterator[Batch]:
    """Returns the batches of the training."""
    text = TextDataModule(
        protocol.pretrained,
        train_files=protocol.train_files,
        val_files=protocol.val_files,
        seq_length=protocol.seq_length,
        batch_size=BATCH,
    )
    loader = text.train_dataloader()
    epochs = itertools.chain.from_iterable(loader for _ in itertools.count())
    return itertools.islice(epochs, STEPS)


def train(model: PreTrainedModel, batches: Iterator[Batch]) -> None:
    """Trains the parameters that require gradients, one step per batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, STEPS, min_lr_rate=0.1)
    model.train()
    for batch in batches:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def run(protocol: Protocol, distillation: Distillation | None) -> Row:
    """Returns the row of one case: prepares the teacher, prunes, trains and measures."""
    model, recipe, recovery = load_model(protocol.pretrained, "float32"), Recipe(sparsity=0.5), MaskedLoRA(r=16)
    training, hook, begin = list(training_batches(protocol)), None, time.process_time()
    if distillation is not None:
        assert distillation.teacher is not None
        student, device = Student(recipe, recovery), torch.device("cpu")
        dense = DenseModel(model, student, distillation.temperature, device, lambda: training)
        hook = DistillationHook(distillation, distillation.teacher.prepare(dense))
    before = time.process_time() - begin
    prune(model, protocol.batches(), recipe)
    torch.manual_seed(0)
    recovery.attach(model)
    if hook is not None:
        hook.register(model)
    begin = time.process_time()
    train(model, iter(training))
    seconds = time.process_time() - begin
    recovery.detach(model)
    measured = measure(model, protocol.data.val_dataloader(), protocol.data.describe("val"))
    return {
        "perplexity": measured.perplexity,
        "tokens_per_second": STEPS * BATCH * protocol.seq_length / seconds,
        "seconds_before": before,
        "bytes": 0 if hook is None else hook.teacher.size_bytes(),
        "protocol": asdict(measured.protocol),
    }


def cases() -> Iterator[tuple[str, Distillation | None]]:
    """Yields the name and the distillation of every case."""
    yield "none", None
    for teacher in (Copy(), Copy("nf4"), SparseDelta(), TopK(64), Copy("bfloat16"), TopK(16)):
        yield f"{teacher}, T 1, weight 0.5", Distillation(1.0, 0.5, teacher)
    for temperature, weight in ((1.0, 0.9), (2.0, 0.5), (1.0, 1.0)):
        yield f"{Copy()}, T {temperature:g}, weight {weight:g}", Distillation(temperature, weight, Copy())


def main() -> None:
    """Runs the missing cases and prints all of them as a table."""
    protocol, results = arguments(
        __doc__, "runs/teachers.jsonl", num_samples=64, seq_length=128, val_windows=128, val_length=256
    )
    rows = [results.once(name, partial(run, protocol, distillation)) for name, distillation in cases()]
    print(f"\n{rows[0]['protocol']}\n\n| teacher | perplexity | speed | seconds before training | bytes stored |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        speed = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        print(
            f"| {row['case']} | {row['perplexity']:.2f} | {speed:.2f} | {row['seconds_before']:.1f} | "
            f"{row['bytes']:,} |"
        )


if __name__ == "__main__":
    main()
