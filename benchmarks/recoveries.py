"""Perplexity, zeros and bytes of every recovery at the same number of steps, each in a run of `lit-prune fit`.

    python benchmarks/recoveries.py
    python benchmarks/recoveries.py --config configs/smollm2_dlp_lora.yaml --runs runs/smollm2_recoveries

All other arguments are passed to `lit-prune fit`. All cases prune the same model from the same statistics and train on
the same windows in the same order. `LoRA, merged and masked` merges plain LoRA and sets the pruned weights to zero
again, which gives a different model from the one that was trained. An interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import tables
import torch
import yaml
from peft.tuners.lora import LoraLayer
from resumable import Protocol, Results, Row
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.data.datamodule import TextDataModule
from lit_prune.evaluation.perplexity import measure
from lit_prune.masks.zeros import zeros
from lit_prune.models.families import find_blocks
from lit_prune.recover import merged_weight
from lit_prune.recover.merge import without_adapter

SPARSITIES, RANK = (0.5, 0.6), 16
CLI = (sys.executable, "-m", "lit_prune.cli")
Options = Sequence[str]


def cases(statistics: Path, full_lr: float) -> Iterator[tuple[str, Options]]:
    """Yields the name of each case and the options that it adds to those of all cases."""
    for sparsity in SPARSITIES:
        share = [f"--pruning.sparsity={sparsity}", f"--pruning.statistics={statistics}"]
        for recovery in ("LoRA", "MaskedLoRA", "QLoRA"):
            yield f"{recovery}, {sparsity}", [*share, *_adapter(recovery)]
        yield f"FullFineTuning, {sparsity}", [*share, "--pruning.recovery=FullFineTuning", f"--model.lr={full_lr}"]
    gradual = [
        f"--pruning.sparsity={sparsity}",
        "--pruning.at_step=[0,20,40]",
        "--pruning.schedule=Cubic",
        *_adapter("MaskedLoRA"),
    ]
    yield f"MaskedLoRA, {sparsity} in three cuts", gradual
    distilled = [*share, *_adapter("MaskedLoRA"), "--pruning.distillation.weight=0.5"]
    yield f"MaskedLoRA, {sparsity}, distilled", distilled


def _adapter(recovery: str) -> Options:
    return [f"--pruning.recovery={recovery}", f"--pruning.recovery.r={RANK}"]


def fit(options: Options, folder: Path) -> Row:
    """Runs one fit into ``folder`` and returns its row."""
    _run("fit", *options, f"--output={folder}", "--overwrite")
    report = json.loads((folder / "report.json").read_text())
    written = [path for path in (folder / "model").iterdir() if path.suffix == ".safetensors"]
    return {
        "perplexity": report["perplexity"],
        "sparsity": report["sparsity"]["achieved_linears"],
        "bytes": sum(path.stat().st_size for path in written),
        "seconds": report["seconds"]["train"],
        "protocol": report["protocol"],
        "folder": str(folder),
    }


def fit_by(protocol: Protocol, options: Options, folder: Path) -> Row:
    """Returns the perplexities before and after 100 steps on the model and the texts of ``protocol``.

    The one before is that of the pruned model, or of the dense one if ``options`` prune nothing.
    """
    files = {"train_files": protocol.train_files, "val_files": protocol.val_files}
    row = fit(
        [
            "--config=configs/smollm2_dlp_lora.yaml",
            f"--model.pretrained={protocol.pretrained}",
            "--data.source=python-docs",
            *(f"--data.{name}={value}" for name, value in files.items() if value),
            f"--data.val_windows={protocol.val_windows}",
            f"--data.val_seq_length={protocol.val_length}",
            f"--data.seq_length={protocol.seq_length}",
            f"--pruning.calibration.seq_length={protocol.seq_length}",
            f"--pruning.calibration.num_samples={protocol.num_samples}",
            f"--trainer.precision={protocol.precision}",
            "--trainer.val_check_interval=1000",
            *options,
        ],
        folder,
    )
    perplexity = row["perplexity"]
    first, last = ("pruned", "recovered") if "pruned" in perplexity else ("before", "after")
    return {
        first: perplexity[first],
        "perplexity": perplexity[last],
        "seconds": row["seconds"],
        "precision": protocol.precision,
    }


@torch.no_grad()
def merged_and_masked(row: Row) -> Row:
    """Returns the row of an exported LoRA after merging the adapter and setting pruned weights to zero again."""
    folder = Path(row["folder"])
    settings = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    data = TextDataModule(**settings | {"tokenizer": str(folder / "model")})
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "model")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            weight.copy_(merged_weight(layer).masked_fill(weight == 0, 0))
    model.disable_adapters()
    blocks = find_blocks(without_adapter(model))
    zero, total = zeros(linear.weight_OI for block in blocks for linear in block.linears.values())
    measured = measure(model, data.val_dataloader(), data.describe("val"))
    shared = {key: row[key] for key in ("protocol", "seconds", "folder")}
    return shared | {"perplexity": {"recovered": measured.perplexity}, "sparsity": zero / total, "bytes": None}


def run(options: Options, results: Results, runs: Path, full_lr: float, only: str) -> list[Row]:
    """Returns the rows of the cases whose name contains ``only``; runs those that are missing from the file."""
    statistics = runs / "statistics"
    if not statistics.exists():
        _run("score", *options, f"--output={statistics}")
    rows = []
    for name, added in ((name, added) for name, added in cases(statistics, full_lr) if only in name):
        folder = runs / name.replace(", ", "-").replace(" ", "_")
        rows.append(results.once(name, partial(fit, [*options, *added], folder)))
        if name.startswith("LoRA,"):
            rows.append(results.once(name.replace(",", ", merged and masked,"), partial(merged_and_masked, rows[-1])))
    return rows


def _run(verb: str, *options: str) -> None:
    subprocess.run([*CLI, verb, *options], check=True)


def print_tables(rows: Sequence[Row]) -> None:
    """Prints the tables."""
    print(f"\n{rows[0]['protocol']}\n\n{tables.recoveries(rows)}")
    lines = []
    for row in rows:
        values = [row["perplexity"].get(key) for key in ("dense", "pruned", "recovered")]
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        lines.append([row["case"], *cells, f"{row['sparsity']:.4f}", f"{row['seconds']:.0f}"])
    print(tables.table(["", "dense", "pruned", "recovered", "sparsity", "seconds of training"], lines))


def main() -> None:
    """Reads the command line, runs the missing cases and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart_masks.yaml", help="Configuration of all runs.")
    parser.add_argument("--runs", type=Path, default=Path("runs/recoveries"), help="Folder of the runs.")
    parser.add_argument("--full_lr", type=float, default=5e-4, help="Learning rate of FullFineTuning.")
    parser.add_argument("--only", default="", help="Run only the cases whose name contains this text.")
    known, rest = parser.parse_known_args()
    results = Results(str(known.runs / "results.jsonl"))
    print_tables(run([f"--config={known.config}", *rest], results, known.runs, known.full_lr, known.only))


if __name__ == "__main__":
    main()
