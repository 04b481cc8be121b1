"""A run that is killed again and again, at any of its steps, ends as one that was never killed, to the bit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_prune.callbacks import DynamicPruningCallback, RunCheckpoint

from lit_prune.calibration.windows import Calibration
from lit_prune.data.loaders import ResumableLoader
from lit_prune.fit.module import PrunableLM
from lit_prune.pruning import Wanda
from lit_prune.recover import MaskedLoRA
from tests.checkpointing.test_resume import Kill, Killed, assert_same, ended
from tests.conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty")
BATCHES = 4  # an epoch's


def run(
    folder: Path,
    *,
    resume: Path | None = None,
    kill: int | None = None,
    others: Sequence[Callback] = (),
    every_n_steps: int = 1,
    **fields: Any,
) -> Trainer | None:
    """One process of a run, to its end; with `kill` it dies in the middle of that step, and None is returned."""
    ids = torch.randint(1, 64, (BATCHES * 2 - 1, 16), generator=torch.Generator().manual_seed(0))
    loader = ResumableLoader([{"input_ids": row} for row in ids], batch_size=2, seed=0)  # type: ignore[arg-type]
    pruning = DynamicPruningCallback(
        method=Wanda(),
        at_step=[0, 5],
        recovery=MaskedLoRA(r=2, dropout=0.2),
        calibration=Calibration(num_samples=2, seq_length=16),
        measure=False,
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    killing = [] if kill is None else [Kill(kill)]
    callbacks = [pruning, RunCheckpoint(str(folder), every_n_steps), *killing, *others]
    trainer = Trainer(**{**quiet, "max_epochs": 3, **fields}, callbacks=callbacks)
    trainer.ckpt_path = resume
    torch.manual_seed(0 if resume is None else 1)  # another process begins with other random numbers
    model = PrunableLM(architecture={"model_type": "llama", **SMALL}, dtype="float32", lr=1e-2, warmup_steps=1)
    try:
        trainer.fit(model, loader)
    except Killed:
        return None
    return trainer


LENGTHS: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 3},
    "epochs, accumulated": {"max_epochs": 3, "accumulate_grad_batches": 3},  # two steps an epoch, the second of a batch
    "steps": {"max_epochs": None, "max_steps": 11},
    "epochs and steps": {"max_epochs": 3, "max_steps": 100},
}
STEPS = {"epochs": 12, "epochs, accumulated": 6, "steps": 11, "epochs and steps": 12}


@pytest.mark.parametrize("length", LENGTHS)
def test_killed_at_every_step(length: str, tmp_path: Path) -> None:
    """Killed after step 1, resumed, killed after step 2, resumed, ...: as many kills as steps."""
    whole = run(tmp_path / "whole", **LENGTHS[length])
    assert whole is not None
    assert whole.global_step == STEPS[length]
    last = tmp_path / "killed" / "last.ckpt"
    assert run(last.parent, kill=1, **LENGTHS[length]) is None
    for step in range(2, STEPS[length]):
        assert run(last.parent, resume=last, kill=step, **LENGTHS[length]) is None
    again = run(last.parent, resume=last, **LENGTHS[length])
    assert again is not None
    assert again.global_step == STEPS[length]
    assert again.current_epoch == whole.current_epoch
    assert again.fit_loop.epoch_loop._batches_that_stepped == STEPS[length]  # the step of loggers
    assert_same(ended(whole), ended(again))


@pytest.mark.parametrize("length", ["epochs", "epochs, accumulated"])
def test_killed_at_a_step_and_at_the_end_of_its_epoch(length: str, tmp_path: Path) -> None:
    whole, each = run(tmp_path / "whole", **LENGTHS[length]), STEPS[length] // 3
    assert whole is not None
    for first in range(1, 2 * each):
        last = tmp_path / f"{first}" / "last.ckpt"
        assert run(last.parent, kill=first, **LENGTHS[length]) is None
        assert run(last.parent, resume=last, kill=each * (first // each + 1), **LENGTHS[length]) is None
        again = run(last.parent, resume=last, **LENGTHS[length])
        assert again is not None
        assert again.global_step == STEPS[length]
        assert_same(ended(whole), ended(again))


@pytest.mark.parametrize("length", ["epochs", "steps"])
def test_from_a_checkpoint_of_the_end_of_an_epoch(length: str, tmp_path: Path) -> None:
    """ModelCheckpoint's, which is written when Lightning has counted the epoch already."""
    ends = {"filename": "{epoch}", "save_top_k": -1, "every_n_epochs": 1, "save_on_train_epoch_end": True}
    whole = run(tmp_path, others=[ModelCheckpoint(tmp_path, **ends)], **LENGTHS[length])
    path = tmp_path / "epoch=0.ckpt"
    again = run(tmp_path, resume=path, others=[ModelCheckpoint(tmp_path, **ends)], **LENGTHS[length])
    assert whole is not None
    assert again is not None
    assert again.global_step == STEPS[length]
    assert_same(ended(whole), ended(again))


@pytest.mark.parametrize("length", ["epochs", "steps"])
def test_stopped_within_an_epoch(length: str, tmp_path: Path) -> None:
    """By `should_stop`, after which Lightning counts the epoch as processed, though batches are left of it."""

    class Enough(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 6

    whole = run(tmp_path / "whole", **LENGTHS[length])
    stopped = run(tmp_path, others=[Enough()], every_n_steps=100, **LENGTHS[length])
    again = run(tmp_path, resume=tmp_path / "last.ckpt", **LENGTHS[length])
    assert whole is not None
    assert stopped is not None
    assert again is not None
    assert (stopped.global_step, again.global_step) == (6, STEPS[length])
    assert_same(ended(whole), ended(again))


def test_more_epochs_are_asked_for_and_the_run_is_resumed_twice(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    run(tmp_path, max_epochs=2)
    for epochs, steps in ((3, 12), (3, 12), (4, 16)):
        trainer = run(tmp_path, resume=last, max_epochs=epochs)
        assert trainer is not None
        assert (trainer.global_step, trainer.current_epoch) == (steps, epochs)
