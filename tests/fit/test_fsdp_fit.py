"""FSDP2 by ModelParallelStrategy: around a foreign module in one process, and as the command in two."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from lit_prune.cli.main import main
from lit_prune.errors import InputError
from lit_prune.fit.fsdp import gathered, is_sharded, shard
from lit_prune.recover import FullFineTuning, MaskedLoRA
from tests.callbacks.test_dynamic_pruning import Foreign, callback, fit, sparsity
from tests.callbacks.test_several_processes import ROOT, command, finished, left, text, with_text  # noqa: F401
from tests.callbacks.test_several_processes import fit as run_fit

SHARDED = [
    "--trainer.devices=2",
    "--trainer.strategy=ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=2",
    "--trainer.strategy.tensor_parallel_size=1",
    "--trainer.strategy.save_distributed_checkpoint=false",
    "--data.batch_size=2",
]
CASES = {
    "MaskedLoRA": ["--pruning.recovery=MaskedLoRA"],
    "LoRA": ["--pruning.recovery=LoRA"],
    "FullFineTuning": ["--pruning.recovery=FullFineTuning", "--trainer.gradient_clip_val=1.0"],
    "bfloat16": [
        "--pruning.recovery=MaskedLoRA",
        "--trainer.precision=bf16-true",
        "--model.gradient_checkpointing=true",
        "--trainer.accumulate_grad_batches=2",
    ],
    "channels": ["--pruning.method=MLPWidth", "--pruning.allocation=DLP", "--pruning.calibration.num_samples=32"],
    "blocks": [
        "--pruning.method=Depth",
        "--pruning.method.refit=true",
        "--pruning.calibration.num_samples=32",
    ],
    "FullFineTuning, weights in bfloat16": ["--pruning.recovery=FullFineTuning", "--model.dtype=bfloat16"],
    "slices": [
        "--pruning.sparsity=0.25",
        "--pruning.method=Slicing",
        "--pruning.calibration.num_samples=32",
    ],
}
RUNS = ["MaskedLoRA"] + [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "MaskedLoRA"]


class Stops(Callback):
    """Ends every process as a kill would, in the middle of the training."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            os._exit(9)


def strategy(**fields: Any) -> ModelParallelStrategy:
    settings = {"data_parallel_size": 1, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    return ModelParallelStrategy(**{**settings, **fields})


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Destroys the process group of one that Lightning leaves behind."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


class Sharding(Foreign):
    """Somebody's own module, which shards as docs/devices.md says; or not, or too early."""

    def __init__(self, when: str = "after setup") -> None:
        super().__init__()
        self.when, self.set_up = when, False

    def setup(self, stage: str) -> None:
        self.set_up = True

    def configure_model(self) -> None:
        due = {"after setup": self.set_up, "at once": True, "never": False}[self.when]
        if due and not is_sharded(self.model):
            shard(self.model, self.device_mesh["data_parallel"])


@pytest.mark.parametrize("recovery", [MaskedLoRA(), FullFineTuning()])
def test_a_foreign_module_is_cut_whole_and_trained_in_shards(alone: None, recovery: Any) -> None:
    module, whole = Sharding(), Foreign()
    torch.manual_seed(0)
    same = {"use_distributed_sampler": False}  # which would shuffle
    fit(module, callback(recovery=recovery), strategy=strategy(), devices=1, **same)
    torch.manual_seed(0)
    fit(whole, callback(recovery=recovery))
    assert is_sharded(module.model)
    found = gathered(module.model)
    assert found is not None
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)
    module.model = found
    assert sparsity(module) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("recovery", [MaskedLoRA(), FullFineTuning()])
def test_a_checkpoint_resumes(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recovery: Any) -> None:
    first, resumed = Sharding(), Sharding()
    trainer = fit(first, callback(recovery=recovery), strategy=strategy(), devices=1, max_steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert stored["lit_prune"]["dropped_weights"] is None
    assert stored["state_dict"].keys() == first.state_dict().keys()
    assert len(stored["optimizer_states"][0]["state"]) > 0
    monkeypatch.setattr("lit_prune.callbacks.dynamic_pruning.prune", None)  # there is no second cut
    path = tmp_path / "half.ckpt"
    fit(resumed, callback(recovery=recovery), strategy=strategy(), devices=1, max_steps=2, ckpt_path=path)
    one, other = gathered(first.model), gathered(resumed.model)
    assert one is not None
    assert other is not None
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("at once", "`model` must not be sharded before it is cut, got DTensors"),
        ("never", "`model` must be sharded in `configure_model` under ModelParallelStrategy, got whole weights"),
    ],
)
def test_sharding_at_another_time_is_refused(alone: None, when: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(Sharding(when), callback(), strategy=strategy(), devices=1)


@pytest.mark.filterwarnings("ignore")  # what jsonargparse says of Lightning
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", *SHARDED, "--pruning.at_step=2"], "`pruning.at_step` must be 0 under ModelParallelStrategy"),
        (["validate", *SHARDED], "`trainer.strategy` must not be ModelParallelStrategy for validate: use ddp"),
        (["fit", "--trainer.strategy=ModelParallelStrategy"], "invalid strategy name.* settings .*see docs/devices.md"),
    ],
)
def test_the_command_tells_mistakes_in_a_line(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*args, "--trainer.accelerator=cpu", "--trainer.max_steps=4", f"--output={tmp_path / 'run'}"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(f"^lit-prune: error: .*{message}", last)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", RUNS)
def test_a_fit_in_two_processes_is_that_of_one(text: Path, tmp_path: Path, case: str) -> None:  # noqa: F811
    main(command(with_text(text, tmp_path / "one"), "--data.batch_size=4", *CASES[case]))
    one, its_weights = left(tmp_path / "one")
    report, weights = finished(text, tmp_path / "two", *SHARDED, *CASES[case])
    assert report["protocol"] == one["protocol"]
    coarse = "bfloat16" in case or case == "slices"
    assert report["perplexity"] == pytest.approx(one["perplexity"], rel=1e-2 if coarse else 1e-5)
    assert report["export"]["verified"]
    assert weights.keys() == its_weights.keys()
    names = sorted(path.name for path in (tmp_path / "one" / "run" / "model").iterdir())
    assert sorted(path.name for path in (tmp_path / "two" / "run" / "model").iterdir()) == names
    if not coarse:
        assert all(torch.equal(weights[name] == 0, tensor == 0) for name, tensor in its_weights.items())
        for name, tensor in its_weights.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)  # four commands, each in processes of its own
@pytest.mark.parametrize("case", ["MaskedLoRA", "FullFineTuning", "FullFineTuning, weights in bfloat16"])
def test_a_run_that_is_killed_goes_on_and_is_exported(text: Path, tmp_path: Path, case: str) -> None:  # noqa: F811
    _, expected = finished(text, tmp_path / "whole", *SHARDED, *CASES[case])
    folder, every = with_text(text, tmp_path / "killed"), "--checkpoint_every=1"
    stops = "--trainer.callbacks+=tests.fit.test_fsdp_fit.Stops"
    assert run_fit(folder, *SHARDED, *CASES[case], every, stops).returncode != 0
    assert not (folder / "run" / "model").exists()
    done = run_fit(folder, *SHARDED, *CASES[case], every, "--ckpt_path=last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Restored all states" in done.stderr
    saved = folder / "run" / "model" / "model.safetensors"
    again = load_file(saved)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    saved.unlink()
    args = [f"--output={folder / 'run'}", "--ckpt_path=last", "--overwrite"]
    line = [sys.executable, "-m", "lit_prune.cli", "export", *args]
    exported = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, timeout=240)
    assert exported.returncode == 0, exported.stderr[-3000:]
    for name, tensor in load_file(saved).items():
        torch.testing.assert_close(tensor, expected[name])


class Fails(Callback):
    """Ends the second process in the middle of the training."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            raise RuntimeError("the second process has had enough")


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all_with_its_message(text: Path) -> None:  # noqa: F811
    done = run_fit(text, *SHARDED, "--trainer.callbacks+=tests.fit.test_fsdp_fit.Fails", "--overwrite")
    assert done.returncode != 0
    assert "the second process has had enough" in done.stderr
    assert not (text / "run" / "model").exists()
