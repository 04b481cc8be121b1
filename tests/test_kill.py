"""`lit-prune fit`, killed by SIGKILL and resumed, leaves what the run that was not killed leaves, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 10
CASES = {
    "masks, LoRA with dropout": [
        "--pruning.at_step=4",
        "--pruning.before=LoRA",
        "--pruning.recovery=LoRA",
        "--pruning.recovery.dropout=0.1",
    ],
    "slices": ["--pruning.method=Slicing", "--pruning.at_step=4", "--pruning.sparsity=0.25"],
    "masks, gradual, MaskedLoRA": [
        "--pruning.at_step=[0,4,7]",
        "--pruning.recovery=MaskedLoRA",
        "--pruning.recovery.dropout=0.1",
    ],
    "masks, gradual, full": [
        "--pruning.method=SparseGPT",
        "--pruning.at_step=[4,7]",
        "--pruning.schedule=Linear",
        "--pruning.recovery=FullFineTuning",
    ],
    "masks, QLoRA": [
        "--pruning.at_step=4",
        "--pruning.before=LoRA",
        "--pruning.recovery=QLoRA",
        "--pruning.recovery.form=requantised",
    ],
    "two processes": [
        "--trainer.devices=2",
        "--trainer.accelerator=cpu",
        "--trainer.strategy=ddp",
        "--pruning.at_step=4",
        "--pruning.before=LoRA",
        "--pruning.recovery=MaskedLoRA",
        "--pruning.recovery.dropout=0.1",
    ],
    "masks at the start": ["--trainer.accumulate_grad_batches=2", "--pruning.full_checkpoint=true"],
}
BEFORE, DURING, AFTER = 2, "Step 4: cutting", 5
USUAL = [("masks, LoRA with dropout", (DURING,))]
MOMENTS: dict[str, tuple[int | str, ...]] = dict.fromkeys(CASES, (BEFORE, DURING, AFTER, 8))
MOMENTS["masks at the start"] = (BEFORE, 8)
ALL = [pytest.param(name, moments, marks=pytest.mark.slow) for name, moments in MOMENTS.items()]


def command(folder: str, *args: str) -> list[str]:
    settings = [
        "--data.train_files=train.txt",
        "--data.val_files=val.txt",
        "--model.dtype=float32",
        "--model.lr=1e-3",
        "--data.seq_length=64",
        "--data.batch_size=2",
        "--data.val_windows=4",
        "--pruning.calibration.num_samples=4",
        "--pruning.calibration.seq_length=64",
        f"--trainer.max_steps={STEPS}",
        "--trainer.val_check_interval=3",
        "--trainer.check_val_every_n_epoch=null",
        "--trainer.enable_progress_bar=false",
        "--checkpoint_every=1",
    ]
    return [sys.executable, "-m", "lit_prune.cli", "fit", f"--output={folder}", *settings, *args]


def write_data(folder: Path) -> None:
    (folder / "train.txt").write_text("".join(f"Return the {n}th item, or raise an error.\n" for n in range(100)))
    (folder / "val.txt").write_text("Open the file, read its lines and close it again.\n" * 60)


def run(folder: str, *args: str) -> None:
    done = subprocess.run(command(folder, *args), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def kill(folder: str, moment: int | str, *args: str) -> None:
    """Runs until a checkpoint of that step is there, or a line is said, and kills."""
    process = subprocess.Popen(command(folder, *args), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")))
    reader.start()
    while process.poll() is None and not due(Path(folder, "checkpoints", "last.ckpt"), moment, said):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "".join(said)[-2000:]
    reader.join()
    process.stderr.close()


def due(checkpoint: Path, moment: int | str, said: list[str]) -> bool:
    if isinstance(moment, str):
        return any(moment in line for line in said)
    # not by mmap, which opens the path twice, and a new checkpoint may have come in between
    return checkpoint.exists() and torch.load(checkpoint, weights_only=True)["global_step"] >= moment


def left(folder: str) -> dict[str, Any]:
    """The output of a run: the bytes of its model, the tensors of its last checkpoint, the rates of every cut."""
    model = {path.name: path.read_bytes() for path in Path(folder, "model").glob("*.safetensors")}
    stored = torch.load(Path(folder, "checkpoints", "last.ckpt"), weights_only=True)
    optimizer = stored["optimizer_states"][0]["state"]
    tensors = {f"{i}.{name}": tensor for i, values in optimizer.items() for name, tensor in values.items()}
    cuts = json.loads(Path(folder, "report.json").read_text())["cuts"]
    told = [{name: cut[name] for name in ("step", "scores", "rates", "perplexity")} for cut in cuts]
    return {"model": model, "tensors": {**stored["state_dict"], **tensors}, "cuts": told, "step": stored["global_step"]}


@pytest.mark.timeout(1500)  # three processes a kill
@pytest.mark.parametrize(("case", "moments"), [*USUAL, *ALL])
def test_a_run_that_is_killed_and_resumed(
    case: str, moments: tuple[int | str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    write_data(tmp_path)
    run("whole", *CASES[case])
    whole = left("whole")
    assert whole["step"] == STEPS
    for index, moment in enumerate(moments):
        folder = f"killed-{index}"
        kill(folder, moment, *CASES[case])
        assert not Path(folder, "model").exists()
        run(folder, "--ckpt_path=last", *CASES[case])
        found = left(folder)
        assert found["cuts"] == whole["cuts"]
        assert found["model"] == whole["model"]
        assert found["tensors"].keys() == whole["tensors"].keys()
        assert all(torch.equal(found["tensors"][name], tensor) for name, tensor in whole["tensors"].items())
        assert list(Path(folder).rglob(".*.partial-*")) == []
