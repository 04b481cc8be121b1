from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lit_prune.callbacks import RunCheckpoint

from lit_prune.checkpointing.io import AtomicCheckpointIO
from lit_prune.errors import InputError
from tests.callbacks.test_dynamic_pruning import QUIET, Foreign, callback, loader


class Saved(RunCheckpoint):
    """Notes the steps that it saves at."""

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        super().__init__(str(folder), every_n_steps)
        self.steps: list[int] = []

    def _save(self, trainer: Trainer) -> None:
        super()._save(trainer)
        self.steps.append(trainer.global_step)


def fit(checkpoint: RunCheckpoint, *others: Callback, **fields: Any) -> None:
    Trainer(**{**QUIET, "max_steps": 11, **fields}, callbacks=[callback(), checkpoint, *others]).fit(
        Foreign(), loader()
    )


def test_at_the_start_every_so_many_steps_and_at_the_end_of_epoch_and_training(tmp_path: Path) -> None:
    checkpoint = Saved(tmp_path, 3)
    fit(checkpoint)  # epochs of 8 batches
    assert checkpoint.steps == [0, 3, 6, 8, 9, 11]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 11


def test_only_between_the_windows_of_accumulated_gradients(tmp_path: Path) -> None:
    batches: list[int] = []

    class Batches(Saved):
        def _save(self, trainer: Trainer) -> None:
            super()._save(trainer)
            batches.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    checkpoint = Batches(tmp_path, 1)
    fit(checkpoint, accumulate_grad_batches=3, max_steps=3)
    assert checkpoint.steps == [0, 1, 2, 3]
    assert batches == [0, 3, 6, 8]


class Stop(Callback):
    """Raises at a hook of the batch with this index."""

    def __init__(self, hook: str, index: int) -> None:
        setattr(self, hook, self.raises)
        self.index = index

    def raises(self, _trainer: Trainer, _module: Any, *args: Any) -> None:
        if args[-1] == self.index:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("hook", "index", "steps"), [("on_train_batch_end", 4, [0, 5]), ("on_train_batch_start", 4, [0])]
)
def test_an_exception_is_saved_where_the_step_is_through(
    tmp_path: Path, hook: str, index: int, steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Saved(tmp_path, 100)
    with pytest.raises(SystemExit):
        fit(checkpoint, Stop(hook, index))
    assert checkpoint.steps == steps
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == steps[-1]
    told = " ".join(capsys.readouterr().err.split())
    assert f"last.ckpt has step {steps[-1]}; the same command with `--ckpt_path last` goes on." in told


def test_an_early_end_is_saved(tmp_path: Path) -> None:
    class Enough(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    checkpoint = Saved(tmp_path, 100)
    fit(checkpoint, Enough())
    assert checkpoint.steps == [0, 4]


def test_checkpoints_are_atomic_unless_the_trainer_has_another_way(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    strategies = [SimpleNamespace(checkpoint_io=TorchCheckpointIO()), SimpleNamespace(checkpoint_io=Own())]
    for strategy in strategies:
        RunCheckpoint(str(tmp_path)).setup(SimpleNamespace(strategy=strategy), Foreign(), "fit")  # type: ignore[arg-type]
    assert [type(strategy.checkpoint_io) for strategy in strategies] == [AtomicCheckpointIO, Own]


def test_a_number_of_steps_below_1(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`checkpoint_every` must be at least 1, .*, got 0"):
        RunCheckpoint(str(tmp_path), 0)


def test_of_several_processes_none_saves_on_an_exception(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(world_size=2)  # there is no loop to ask, and nothing to save
    RunCheckpoint(str(tmp_path)).on_exception(trainer, Foreign(), RuntimeError())
    with pytest.raises(AttributeError):
        RunCheckpoint(str(tmp_path)).on_exception(SimpleNamespace(world_size=1), Foreign(), RuntimeError())  # type: ignore[arg-type]
