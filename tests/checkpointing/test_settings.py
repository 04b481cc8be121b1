"""Settings of a run are collected from the Trainer and its parts; a resumed run with others names each of them."""

from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from lit_prune.checkpointing.settings import PROCESSES, check_settings, run_settings
from lit_prune.errors import InputError


class Module(LightningModule):
    def resume_settings(self) -> dict[str, Any]:
        return {"model.lr": 0.1}


def test_the_trainer_and_the_module_say_their_settings() -> None:
    trainer = Trainer(accelerator="cpu", accumulate_grad_batches=3, logger=False, enable_checkpointing=False)
    settings = run_settings(trainer, Module())
    assert settings["trainer.accumulate_grad_batches"] == 3
    assert settings["trainer.precision"] == "32-true"
    assert settings[PROCESSES] == 1
    assert settings["model.lr"] == 0.1
    assert "model.lr" not in run_settings(trainer, LightningModule())


def test_settings_that_are_the_same_or_new_pass() -> None:
    check_settings({"model.lr": 0.1, "data.new": 1}, {"model.lr": 0.1, "data.old": 2})


def test_every_setting_that_differs_is_named() -> None:
    with pytest.raises(InputError) as refused:
        check_settings({"model.lr": 0.2, "data.seed": 1, "same": 0}, {"model.lr": 0.1, "data.seed": 0, "same": 0})
    assert str(refused.value) == (
        "`model.lr` must be what the checkpoint was made with, 0.1, got 0.2; so must `data.seed`, 0, got 1; change "
        "them back, or begin a new run."
    )


def test_long_numbers_are_shortened_unless_that_makes_them_equal() -> None:
    with pytest.raises(InputError, match=r"made with, 0\.333333, got 0\.25; change it back"):
        check_settings({"a": 0.25}, {"a": 1 / 3})
    with pytest.raises(InputError, match=r"made with, 0\.3333333333333333, got 0\.33333333333333"):
        check_settings({"a": 1 / 3 + 1e-15}, {"a": 1 / 3})
