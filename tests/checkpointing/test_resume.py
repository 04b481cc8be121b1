"""A run that was stopped and resumed ends with the weights of one that was not, bit for bit."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lit_prune.callbacks import DynamicPruningCallback, RunCheckpoint

from lit_prune.allocate import DLP
from lit_prune.calibration.windows import Calibration
from lit_prune.checkpointing.resume import Resume
from lit_prune.cli.main import main
from lit_prune.data.datamodule import TextDataModule
from lit_prune.depth import Depth
from lit_prune.errors import InputError
from lit_prune.fit.module import PrunableLM
from lit_prune.pruning import Magnitude, SparseGPT, Wanda
from lit_prune.reconstruct import Reconstruct
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA, Snapshot
from lit_prune.shrink import MLPWidth
from lit_prune.slice import Slicing

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty")
STEPS = 8  # two epochs of five batches, but for the last two


class Killed(RuntimeError):
    """Stands for a SIGKILL."""


class Kill(Callback):
    """Ends the run in mid-step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Killed


class KeepAll(Callback):
    """Keeps a copy of every checkpoint of a run, for a run to go on from."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        folder = Path(trainer.checkpoint_callback.path).parent
        trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt", weights_only=False)


CASES: dict[str, dict[str, Any]] = {
    "masks at 0, dropout": {"method": Wanda(), "recovery": LoRA(r=4, dropout=0.2)},
    "masks at 3, LoRA before": {"method": Wanda(), "at_step": 3, "before": LoRA(r=2, dropout=0.2), "recovery": LoRA()},
    "masks at 3, full before": {"method": SparseGPT(), "at_step": 3, "recovery": LoRA(r=4)},
    "gradual, MaskedLoRA": {
        "method": Wanda(),
        "at_step": [0, 3, 6],
        "sparsity": 0.6,
        "recovery": MaskedLoRA(dropout=0.2),
    },
    "gradual, full": {"method": Magnitude(), "at_step": [1, 6], "sparsity": [0.3, 0.6], "recovery": FullFineTuning()},
    "gradual, reconstructed": {
        "method": Wanda(),
        "at_step": [0, 3],
        "recovery": MaskedLoRA(),
        "reconstruction": Reconstruct(epochs=1, lr=1e-4),
    },
    "masks at 0, QLoRA": {"method": Wanda(), "recovery": QLoRA(r=4, dropout=0.2)},
    "masks at 3, QLoRA masked": {
        "method": Wanda(),
        "at_step": 3,
        "before": LoRA(r=2),
        "recovery": QLoRA(r=4, dropout=0.2, form="merged"),
    },
    "slices at 3, QLoRA": {
        "method": Slicing(),
        "at_step": 3,
        "before": LoRA(r=2),
        "recovery": QLoRA(r=4, quantization="int8", form="requantised"),
    },
    "slices at 3": {"method": Slicing(), "at_step": 3, "before": LoRA(r=2), "recovery": LoRA(r=4, dropout=0.1)},
    "slices at 3, full": {"method": Slicing(), "at_step": 3, "sparsity": 0.25},
    "channels at 0 and 3": {
        "method": MLPWidth(),
        "allocation": DLP(),
        "at_step": [0, 3],
        "sparsity": [0.25, 0.5],
        "recovery": LoRA(r=4, dropout=0.1),
    },
    "blocks at 0 and 3": {
        "method": Depth(refit=True),
        "at_step": [0, 3],
        "sparsity": [0.25, 0.5],
        "recovery": LoRA(r=4, dropout=0.1),
    },
    "not pruned": {"method": None},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text("".join(f"Return the {n}th item, or raise an error.\n" for n in range(27)))
    (tmp_path / "val.txt").write_text("Open the file, read its lines and close it again.\n" * 8)
    return tmp_path


def run(
    folder: Path, pruning: DynamicPruningCallback, *others: Callback, resume: Path | None = None, **fields: Any
) -> Trainer:
    data = TextDataModule(
        train_files=str(folder / "train.txt"),
        val_files=str(folder / "val.txt"),
        seq_length=32,
        batch_size=2,
        val_windows=4,
    )
    checkpoint = RunCheckpoint(str(folder / "checkpoints"), every_n_steps=2)
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_steps": STEPS,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    }
    trainer = Trainer(**{**settings, **fields}, callbacks=[pruning, checkpoint, *others])
    if resume is not None:
        trainer.ckpt_path = resume
    else:
        torch.manual_seed(0)
    trainer.fit(PrunableLM("embedded", dtype="float32", lr=1e-2, warmup_steps=1), data)
    return trainer


def callback(**fields: Any) -> DynamicPruningCallback:
    return DynamicPruningCallback(**{"calibration": Calibration(num_samples=2, seq_length=32), **fields})


def ended(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a run ends with: weights, and the state of the optimizer."""
    optimizer = trainer.optimizers[0].state_dict()["state"]
    state = {f"{i}.{name}": tensor for i, values in optimizer.items() for name, tensor in values.items()}
    return {**trainer.lightning_module.state_dict(), **state}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


SLOW = ("masks at 0, QLoRA", "slices at 3, QLoRA")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
@pytest.mark.parametrize("steps", [(2, 6), pytest.param((1, 3, 4, 5, 7, 8), marks=pytest.mark.slow)])
def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped(case: str, steps: tuple[int, ...], text: Path) -> None:
    whole = ended(run(text, callback(**CASES[case]), KeepAll()))
    for step in steps:  # before a cut, at one, after one, at the end of an epoch (5), in the next
        path = text / "checkpoints" / f"{step}.ckpt"
        assert torch.load(path, weights_only=True)["global_step"] == step
        torch.manual_seed(step)  # what a new process begins with
        trainer = run(text, callback(**CASES[case]), resume=path)
        assert trainer.global_step == STEPS
        assert_same(whole, ended(trainer))


@pytest.mark.parametrize("case", ["gradual, MaskedLoRA", "gradual, full"])
def test_in_half_precision_too(case: str, text: Path) -> None:
    """Adapters, master weights and moments are in float32, in the checkpoint too, and are not cast with the model."""
    fields: dict[str, Any] = {"precision": "bf16-true"}
    whole = ended(run(text, callback(**CASES[case]), KeepAll(), **fields))
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16, torch.float32}
    trainer = run(text, callback(**CASES[case]), resume=text / "checkpoints" / "4.ckpt", **fields)
    assert_same(whole, ended(trainer))


def test_a_run_of_so_many_epochs_goes_on_in_the_middle_of_one(text: Path) -> None:
    """Whoever asks Lightning how many steps they are has the loader made before its position is known."""
    length: dict[str, Any] = {"max_steps": -1, "max_epochs": 2}
    whole = ended(run(text, callback(method=Wanda(), recovery=LoRA(r=2)), KeepAll(), **length))
    for step in (2, 7):
        path = text / "checkpoints" / f"{step}.ckpt"
        trainer = run(text, callback(method=Wanda(), recovery=LoRA(r=2)), resume=path, **length)
        assert trainer.global_step == 10
        assert_same(whole, ended(trainer))


class Counts:
    """Counts the checkpoints that lit_prune, not Lightning, opens, and the models that it rebuilds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loads, self.rebuilds = 0, 0
        load, rebuild = torch.load, Snapshot.rebuild

        def counted_load(*args: Any, **fields: Any) -> Any:
            self.loads += sys._getframe(1).f_globals["__name__"].startswith("lit_prune")
            return load(*args, **fields)

        def counted_rebuild(snapshot: Snapshot, model: Any) -> None:
            self.rebuilds += 1
            rebuild(snapshot, model)

        monkeypatch.setattr(torch, "load", counted_load)
        monkeypatch.setattr(Snapshot, "rebuild", counted_rebuild)


@pytest.mark.filterwarnings("ignore")  # what jsonargparse says of Lightning
def test_a_resumed_fit_and_an_export_open_the_checkpoint_once_and_rebuild_once(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text)
    settings = ["--data.train_files=train.txt", "--data.val_files=val.txt", "--data.seq_length=32", "--output=run"]
    settings += ["--pruning.calibration.num_samples=2", "--pruning.calibration.seq_length=32", "--pruning.at_step=1"]
    settings += ["--pruning.before=LoRA", "--pruning.distillation=Distillation", "--pruning.measure=false"]
    settings += ["--data.val_windows=1", "--data.batch_size=2", "--trainer.enable_progress_bar=false"]
    main(["fit", *settings, "--trainer.max_steps=2"])
    counts = Counts(monkeypatch)
    main(["fit", *settings, "--trainer.max_steps=3", "--ckpt_path=last"])
    assert (counts.loads, counts.rebuilds) == (1, 1)
    counts = Counts(monkeypatch)
    main(["export", "--output=run", "--ckpt_path=last", "--overwrite"])
    assert (counts.loads, counts.rebuilds) == (1, 1)


def test_outside_the_command_the_callback_opens_it_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(text, callback(method=Wanda(), recovery=LoRA(r=2)), max_steps=1, val_check_interval=1)
    counts = Counts(monkeypatch)
    path = text / "checkpoints" / "last.ckpt"
    trainer = run(text, callback(method=Wanda(), recovery=LoRA(r=2)), resume=path, max_steps=2, val_check_interval=1)
    assert (counts.loads, counts.rebuilds) == (1, 1)
    counts = Counts(monkeypatch)
    trainer.ckpt_path = None
    trainer.validate(trainer.lightning_module, trainer.datamodule.val_dataloader(), ckpt_path=path)  # type: ignore[attr-defined]
    assert counts.loads == 0  # Lightning opens it alone
    PrunableLM("embedded", dtype="float32").on_load_checkpoint(torch.load(path, weights_only=True))
    assert counts.rebuilds == 2


def test_outside_the_command_a_shorter_training_is_refused_too(text: Path) -> None:
    run(text, callback(method=Wanda(), recovery=LoRA(r=2)), max_steps=2, val_check_interval=1)
    path = text / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match="`trainer.max_steps` must be at least 2, the step of the checkpoint, got 1"):
        run(text, callback(method=Wanda(), recovery=LoRA(r=2)), resume=path, max_steps=1, val_check_interval=1)


def test_what_is_no_checkpoint_of_a_fit(tmp_path: Path) -> None:
    path = str(tmp_path / "x.ckpt")
    Path(path).write_text("no checkpoint")
    with pytest.raises(InputError, match=r"`ckpt_path` must be a checkpoint of a fit, .*x.ckpt cannot be read as one"):
        Resume.open(path)
    for content in ({"state_dict": {}}, [1]):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"must be a whole checkpoint of a fit .*, got .*x.ckpt; one that was"):
            Resume.open(path)
