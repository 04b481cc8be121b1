"""Perplexity at equal steps of the recoveries, and of LoRA merged and masked again; takes up where it was stopped.

    python benchmarks/recoveries.py --results runs/recoveries.jsonl

Every case prunes the same model in the same way (DLP + Wanda), trains the same windows in the same order (seed 0,
AdamW, ten steps of warm-up and a cosine), and is measured by itself, so that every line of the results file is one
case. `LoRA, merged and masked` is what one gets who merges plain LoRA and puts the zeros back: not what was trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from resumable import Protocol, Row, arguments
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from lit_prune.data import TextDataModule
from lit_prune.evaluate import measure, zeros
from lit_prune.export import merged, merges, without_adapter
from lit_prune.families import find_blocks
from lit_prune.load import load_model
from lit_prune.pipeline import Recipe, prune
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, Recovery, merged_weight

STEPS, BATCH = 100, 8
Finish = Callable[[PreTrainedModel], PreTrainedModel]


def train(protocol: Protocol, model: PreTrainedModel, lr: float) -> None:
    """Trains what requires gradients for ``STEPS`` steps of ``BATCH`` calibration-length windows."""
    text = TextDataModule(
        protocol.pretrained,
        train_files=protocol.train_files,
        val_files=protocol.val_files,
        seq_length=protocol.seq_length,
        batch_size=BATCH,
    )
    batches: DataLoader = text.train_dataloader()
    given = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(given, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, STEPS, min_lr_rate=0.1)
    model.train()
    step = 0
    torch.manual_seed(0)
    while step < STEPS:
        for batch in batches:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step == STEPS:
                return


@torch.no_grad()
def masked_again(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model with plain LoRA merged and what was zero set to zero again."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            weight.copy_(merged_weight(layer).masked_fill(weight == 0, 0))
    return without_adapter(model)


def exported(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model as its export would have it."""
    return merged(model) if merges(model) else model


def run(protocol: Protocol, recovery: Recovery | None, lr: float, finish: Finish) -> Row:
    """Returns the row of one case: prune, train, finish, measure."""
    model, begin = load_model(protocol.pretrained, "float32"), time.perf_counter()
    prune(model, protocol.batches(), Recipe(sparsity=0.5))
    if recovery is not None:
        torch.manual_seed(0)
        recovery.attach(model)
        train(protocol, model, lr)
    seconds = time.perf_counter() - begin
    model = finish(model)
    blocks = find_blocks(without_adapter(model))
    zero, total = zeros(linear.weight_OI for block in blocks for linear in block.linears.values())
    found = measure(model, protocol.data.val_dataloader(), protocol.data.describe("val"))
    return {
        "perplexity": found.perplexity,
        "sparsity": zero / total,
        "seconds": seconds,
        "protocol": found.protocol,
    }


def cases() -> Iterator[tuple[str, Recovery | None, float, Finish]]:
    """Yields a name, a recovery, a learning rate, and what is done to the model before it is measured."""
    yield "pruned, not healed", None, 0.0, exported
    yield "LoRA, apart, lr 0.002", LoRA(r=16), 2e-3, exported
    yield "MaskedLoRA, merged, lr 0.002", MaskedLoRA(r=16), 2e-3, exported
    yield "LoRA, merged and masked, lr 0.002", LoRA(r=16), 2e-3, masked_again
    yield "FullFineTuning, lr 0.0002", FullFineTuning(), 2e-4, exported
    yield "FullFineTuning, lr 0.0005", FullFineTuning(), 5e-4, exported


def main() -> None:
    """Runs the cases that the results file has not, and prints all as a table."""
    protocol, results = arguments(
        __doc__, "runs/recoveries.jsonl", num_samples=64, seq_length=256, val_windows=128, val_length=256
    )
    rows = [results.once(name, partial(run, protocol, *rest)) for name, *rest in cases()]
    print(f"\n{rows[0]['protocol']}\n\n| case | perplexity | sparsity | seconds |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {row['case']} | {row['perplexity']:.2f} | {row['sparsity']:.4f} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    main()
