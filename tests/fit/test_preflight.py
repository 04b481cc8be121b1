"""Settings that are refused before the first batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LambdaCallback,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, MixedPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lit_prune.allocate import LayerRedundancy
from lit_prune.calibration.windows import Calibration
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
    check_scaled_gradients,
    check_trainer,
    check_without_weights,
    resume_settings,
)
from lit_prune.models.load import skeleton
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA
from lit_prune.slice import Slicing
from tests.callbacks.test_dynamic_pruning import Foreign, callback, fit, loader
from tests.conftest import small_model


class FakeScaler(torch.amp.GradScaler):
    """One that needs no GPU."""

    def __init__(self) -> None:
        super().__init__("cpu")


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

    class ThreeSteps(Trainer):
        estimated_stepping_batches = 3

    with pytest.raises(InputError, match=r"`pruning.at_step` must be below the number of optimizer steps, 3 .*, got 4"):
        check_data(plan, ThreeSteps(accelerator="cpu", logger=False, max_epochs=1))


@pytest.mark.parametrize(
    "other", [WeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-3), ModelPruning("l1_unstructured")]
)
def test_callbacks_that_do_not_go_with_a_cut(other: Callback) -> None:
    check_trainer(callback(method=None, recovery=None).fit_plan, trainer(callbacks=[other]))
    with pytest.raises(InputError, match=f"`trainer.callbacks` must not hold {type(other).__name__} beside pruning"):
        check_trainer(callback().fit_plan, trainer(callbacks=[other]))


def test_precision_that_replaces_the_linears() -> None:
    for plugin, message in (
        (
            BitsandbytesPrecision,
            "`trainer.plugins` must not hold BitsandbytesPrecision, .*use `--pruning.reco",
        ),
        (
            TransformerEnginePrecision,
            "`trainer.precision` must not be transformer-engine, .*use bf16-mixed",
        ),
    ):
        unusable: Any = SimpleNamespace(
            callbacks=[], strategy=trainer().strategy, precision_plugin=plugin.__new__(plugin)
        )
        with pytest.raises(InputError, match=message):
            check_trainer(callback().fit_plan, unusable)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulate_grad_batches": 0}, "`trainer.accumulate_grad_batches` must be at least 1, got 0"),
        ({"limit_train_batches": 0}, "`trainer.limit_train_batches` must be above 0 for fit, which trains, got 0"),
        ({"limit_train_batches": 0.1}, "`trainer.limit_train_batches` must leave at least one batch, 0.1 of 8 does"),
        ({"limit_val_batches": 0.1}, "`trainer.limit_val_batches` must leave at least one batch, 0.1 of 8 does not"),
    ],
)
@pytest.mark.parametrize("at_step", [0, 2])
def test_limits_that_leave_no_batch(
    fields: dict[str, Any], message: str, at_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_prune.fit.run.PruningRun.prepare", lambda *_: pytest.fail("the model was read"))
    with pytest.raises(InputError, match=message):
        fit(Foreign(), callback(at_step=at_step, measure=False), loader(1), **fields)


def test_the_windows_of_a_later_cut_are_there_before_the_training() -> None:
    steps: list[int] = []
    later = callback(at_step=2, calibration=Calibration(num_samples=33, seq_length=16))
    with pytest.raises(InputError, match="`calibration.num_samples` must be at most 32, .*got 33"):
        fit(Foreign(), later, callbacks=[LambdaCallback(on_train_batch_start=lambda *args: steps.append(args[-1]))])
    assert steps == []


def test_gradients_in_float16_cannot_be_scaled() -> None:
    plan, scaled = callback(recovery=FullFineTuning()).fit_plan, MixedPrecision("16-mixed", "cuda", FakeScaler())
    on_gpu = trainer()
    on_gpu.strategy.precision_plugin = scaled
    with pytest.raises(InputError, match=r"`trainer.precision` must not be 16-mixed for weights in float16 that are"):
        check_scaled_gradients(plan, on_gpu, torch.float16)
    with pytest.raises(InputError, match=r"`trainer.precision` must not be 16-mixed"):  # trained before the cut
        check_scaled_gradients(callback(recovery=LoRA(), at_step=2).fit_plan, on_gpu, torch.float16)
    later = callback(recovery=LoRA(), before=LoRA(), at_step=2)
    for fine in (callback(recovery=LoRA()), callback(recovery=QLoRA()), later):
        check_scaled_gradients(fine.fit_plan, on_gpu, torch.float16)
    for dtype in (torch.float32, torch.bfloat16, None):
        check_scaled_gradients(plan, on_gpu, dtype)
    check_scaled_gradients(plan, trainer(), torch.float16)


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
    checkpoint: dict[str, Any] = {"global_step": 3}
    settings = resume_settings(plan, trainer(), module) | {"data.seed": 1}
    RunRecord(settings=settings).write_to(checkpoint)
    check_resumed(plan, Resume(checkpoint), trainer(), module, data)
    for steps in (3, -1):
        check_resumed(plan, Resume(checkpoint), trainer(max_steps=steps), module, data)
    with pytest.raises(InputError, match="`trainer.max_steps` must be at least 3, the step of the checkpoint, got 2"):
        check_resumed(plan, Resume(checkpoint), trainer(max_steps=2), module, data)
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


def test_a_callback_that_says_what_is_trained() -> None:
    finetuning, idle = trainer(callbacks=[BackboneFinetuning()]), callback(method=None, recovery=None).fit_plan
    message = "`trainer.callbacks` must not hold BackboneFinetuning, .*: here `pruning.recovery` says what is trained"
    for plan in (callback().fit_plan, idle):
        with pytest.raises(InputError, match=message):
            check_trainer(plan, finetuning)
    module = LightningModule()
    module.backbone = torch.nn.Linear(2, 2)
    finetuning.strategy.connect(module)
    check_trainer(idle, finetuning)
    with pytest.raises(InputError, match=message):
        check_trainer(callback().fit_plan, finetuning)
