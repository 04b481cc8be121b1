"""`lit-prune fit` in several processes: what comes out is what one process makes of batches so many times as large."""

import argparse
import inspect
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
CASES = {
    "masks at the start": ["--pruning.recovery=MaskedLoRA"],
    "masks later": ["--pruning.at_step=2", "--pruning.before=LoRA", "--pruning.recovery=FullFineTuning"],
    "weights in bfloat16": ["--pruning.recovery=FullFineTuning", "--model.dtype=bfloat16"],
    "words looked up": ["--pruning.recovery=MaskedLoRA", "--pruning.distillation.teacher=TopK"],
    "masks later, quantised": [
        "--pruning.at_step=2",
        "--pruning.before=LoRA",
        "--pruning.recovery=QLoRA",
        "--pruning.recovery.form=merged",
        "--pruning.recovery.quantization=int8",
    ],
    "channels later": [
        "--pruning.at_step=2",
        "--pruning.method=MLPWidth",
        "--pruning.allocation=DLP",
        "--pruning.calibration.num_samples=32",
    ],
    "blocks later": [
        "--pruning.at_step=2",
        "--pruning.method=Depth",
        "--pruning.method.refit=true",
        "--pruning.calibration.num_samples=32",
    ],
    "slices later": [  # more tokens than dimensions, or the axes hang on the last bit
        "--pruning.sparsity=0.25",
        "--pruning.at_step=2",
        "--pruning.method=Slicing",
        "--pruning.calibration.num_samples=32",
    ],
}
RUNS = [("masks later", 2)] + [
    pytest.param(case, number, marks=pytest.mark.slow)
    for case, number in (
        ("masks at the start", 2),
        ("weights in bfloat16", 2),
        ("words looked up", 2),
        ("masks later, quantised", 2),
        ("slices later", 2),
        ("channels later", 2),
        ("blocks later", 2),
        ("masks later", 4),
    )
]


class Fails(Callback):
    """Ends the second process in the middle of the training."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            raise RuntimeError("the second process has had enough")


def command(folder: Path, *args: str) -> list[str]:
    """A small fit; the batch of all processes is four windows."""
    return [
        "fit",
        f"--output={folder / 'run'}",
        f"--data.train_files={folder / 'train.txt'}",
        f"--data.val_files={folder / 'val.txt'}",
        "--model.dtype=float32",
        "--data.seq_length=32",
        "--data.val_windows=5",
        "--pruning.calibration.num_samples=5",
        "--pruning.calibration.seq_length=32",
        "--trainer.max_steps=4",
        "--trainer.accelerator=cpu",
        "--trainer.val_check_interval=4",
        "--trainer.check_val_every_n_epoch=null",
        "--trainer.enable_progress_bar=false",
        *args,
    ]


def fit(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs from the root, so that what is defined here can be named."""
    line = [sys.executable, "-m", "lit_prune.cli", *command(folder, *args)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, timeout=240)


def several(number: int) -> list[str]:
    return [f"--trainer.devices={number}", "--trainer.strategy=ddp", f"--data.batch_size={4 // number}"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, module in (("train.txt", argparse), ("val.txt", textwrap)):  # varied text, or slices hang on the last bit
        (folder / name).write_text(inspect.getsource(module))
    return folder


def finished(text: Path, folder: Path, *args: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    done = fit(with_text(text, folder), *args)
    assert done.returncode == 0, done.stderr[-3000:]
    return left(folder)


def with_text(text: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("train.txt", "val.txt"):
        (folder / name).symlink_to(text / name)
    return folder


def left(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The report and the weights of a fit."""
    report = json.loads((folder / "run" / "report.json").read_text())
    return report, load_file(folder / "run" / "model" / "model.safetensors")


@pytest.mark.parametrize(("case", "number"), RUNS)
def test_a_fit_is_that_of_one_process(text: Path, tmp_path: Path, case: str, number: int) -> None:
    one, its_weights = finished(text, tmp_path / "one", "--data.batch_size=4", *CASES[case])
    report, weights = finished(text, tmp_path / "several", *several(number), *CASES[case])
    assert report["protocol"] == one["protocol"]
    assert [cut["rates"] for cut in report["cuts"]] == [pytest.approx(cut["rates"], rel=1e-3) for cut in one["cuts"]]
    assert report["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    assert report["export"]["verified"]
    assert weights.keys() == its_weights.keys()
    if "slices" not in case:  # the axes of near-equal eigenvalues turn with the last bit
        moved = [torch.dist(weights[name], its_weights[name]) / its_weights[name].norm() for name in weights]
        assert max(moved) < 1e-2
        gone = {name: weight == 0 for name, weight in its_weights.items() if "proj" in name}
        differ = sum(int(((weights[name] == 0) != gone[name]).sum()) for name in gone)
        assert differ <= 1e-4 * sum(int(zeros.sum()) for zeros in gone.values())
    logged = (tmp_path / "several" / "run" / "logs" / "version_0" / "metrics.csv").read_text()
    assert "val/perplexity" in logged


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all_with_its_message(text: Path) -> None:
    begin = time.monotonic()
    callback = "--trainer.callbacks+=tests.callbacks.test_several_processes.Fails"
    done = fit(text, *several(2), callback, "--pruning.recovery=LoRA")
    assert done.returncode != 0
    assert "the second process has had enough" in done.stderr
    assert time.monotonic() - begin < 200
    assert not (text / "run" / "model").exists()


@pytest.mark.slow
def test_a_mistake_is_told_by_the_process_that_finds_it(text: Path) -> None:
    done = fit(text, *several(2), "--pruning.calibration.num_samples=1", "--overwrite")
    assert done.returncode == 2
    assert "`calibration.num_samples` must give every process a batch, got 1 batches for 2 processes" in done.stderr
    assert "Traceback" not in done.stderr
