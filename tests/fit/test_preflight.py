"""Settings that are refused before the first batch."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lit_prune.allocate import LayerRedundancy
from lit_prune.checkpointing.record import RunRecord
from lit_prune.checkpointing.resume import Resume
from lit_prune.distill import Distillation, TopK
from lit_prune.errors import InputError
from lit_prune.fit.module import PrunableLM
from lit_prune.fit.preflight import (
    check_data,
    check_one_process,
    check_processes,
    check_resumed,
    check_trainer,
    check_without_weights,
    resume_settings,
)
from lit_prune.models.load import skeleton
from lit_prune.recover import LoRA, MaskedLoRA, QLoRA
from lit_prune.slice import Slicing
from tests.callbacks.test_dynamic_pruning import Foreign, callback
from tests.conftest import small_model


def trainer(**fields: Any) -> Trainer:
    return Trainer(**{"accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 4, **fields})


def sharding(**fields: Any) -> ModelParallelStrategy:
    settings = {"data_parallel_size": 1, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    return ModelParallelStrategy(**{**settings, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_parallel_size": "auto"}, "init_args.data_parallel_size` must be 1, got auto: weights are sharded"),
        ({"tensor_parallel_size": 2}, "init_args.tensor_parallel_size` must be 1, got 2: weights are sharded"),
        ({"save_distributed_checkpoint": True}, "init_args.save_distributed_checkpoint` must be false, got true"),
    ],
)
def test_other_forms_of_the_strategy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_trainer(callback(method=None, recovery=None).fit_plan, trainer(strategy=sharding(**fields)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"at_step": 3}, "`pruning.at_step` must be 0 under ModelParallelStrategy, .* got 3: prune at the start"),
        ({"recovery": QLoRA()}, r"`pruning.recovery` must leave the weights in full precision .* got QLoRA\("),
        ({"distillation": Distillation()}, "`pruning.distillation` must be null under ModelParallelStrategy"),
    ],
)
def test_what_sharded_weights_do_not_allow(fields: dict[str, Any], message: str) -> None:
    usual, plan = callback(recovery=MaskedLoRA()).fit_plan, callback(**fields).fit_plan
    check_trainer(usual, trainer(strategy=sharding()))
    with pytest.raises(InputError, match=message):
        check_trainer(plan, trainer(strategy=sharding()))
    check_trainer(plan, trainer())


def test_a_cut_after_the_end() -> None:
    plan = callback(at_step=4).fit_plan
    check_trainer(plan, trainer(max_steps=5))
    with pytest.raises(InputError, match=r"`pruning.at_step` must be below the number of optimizer steps, 4 .*, got 4"):
        check_trainer(plan, trainer(max_steps=4))
    by_epochs: Any = SimpleNamespace(max_steps=-1, estimated_stepping_batches=3, val_check_interval=1.0)
    with pytest.raises(InputError, match=r"`pruning.at_step` must be below the number of optimizer steps, 3 .*, got 4"):
        check_data(plan, by_epochs)


@pytest.mark.parametrize("average", [WeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-3)])
def test_callbacks_with_a_copy_of_the_weights(average: Callback) -> None:
    check_trainer(callback(method=None, recovery=None).fit_plan, trainer(callbacks=[average]))
    with pytest.raises(InputError, match=f"`trainer.callbacks` must not hold {type(average).__name__} beside pruning"):
        check_trainer(callback().fit_plan, trainer(callbacks=[average]))


def test_processes() -> None:
    other: Any = SimpleNamespace(strategy=object(), world_size=2)
    with pytest.raises(InputError, match=r"`trainer.strategy` must be ddp or ModelParallelStrategy .*, got object"):
        check_processes(other)
    with pytest.raises(InputError, match="`trainer.devices` must be 1 for score, which trains nothing, got 2"):
        check_one_process(other, "score")
    check_one_process(trainer(), "score")


def test_a_checkpoint_of_other_settings_is_refused_before_any_text_is_read() -> None:
    plan, module = callback().fit_plan, PrunableLM("embedded")
    data: Any = SimpleNamespace(expected_settings=lambda: {"data.seed": 1})
    checkpoint: dict[str, Any] = {}
    settings = resume_settings(plan, trainer(), module) | {"data.seed": 1}
    RunRecord(settings=settings).write_to(checkpoint)
    check_resumed(plan, Resume(checkpoint), trainer(), module, data)
    data.expected_settings = lambda: {"data.seed": 2}
    with pytest.raises(InputError, match="`data.seed` must be what the checkpoint was made with, 1, got 2"):
        check_resumed(plan, Resume(checkpoint), trainer(), module, data)
    with pytest.raises(InputError, match=r"`pruning.recovery` must be .*; so must `data.seed`, 1, got 2; change"):
        check_resumed(callback(recovery=LoRA(r=3)).fit_plan, Resume(checkpoint), trainer(), module, data)


def test_names_and_adapters_are_checked_without_weights() -> None:
    model = small_model().to("meta")
    check_without_weights(callback().fit_plan, model, None, trains=True)
    with pytest.raises(InputError, match="`pruning.targets` must match a linear, got 'qproj'"):
        check_without_weights(callback(targets=["qproj"]).fit_plan, model, None, trains=True)
    wrong = callback(recovery=LoRA(target_modules=["qproj"])).fit_plan
    with pytest.raises(InputError, match="target_modules"):
        check_without_weights(wrong, model, None, trains=True)
    check_without_weights(wrong, model, None, trains=False)


def test_a_family_that_cannot_be_sliced_is_refused_before_its_blocks_are_asked_for() -> None:
    ambiguous = skeleton(small_model("stablelm").config)
    ambiguous.model.others = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    plan = callback(method=Slicing(), sparsity=0.25, allocation=LayerRedundancy()).fit_plan
    with pytest.raises(InputError, match="`pruning.method` Slicing cannot slice the family 'stablelm'"):
        check_without_weights(plan, ambiguous, None, trains=True)


def test_a_training_that_a_teacher_reads_ahead_has_its_length_among_the_settings() -> None:
    usual = resume_settings(callback().fit_plan, trainer(), Foreign())
    ahead = resume_settings(callback(distillation=Distillation(teacher=TopK())).fit_plan, trainer(), Foreign())
    assert "trainer.max_steps" not in usual
    assert ahead["trainer.max_steps"] == 4
