"""Progress through a plan: cuts made, the next cut; the cuts themselves are in tests/callbacks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lit_prune.errors import InputError
from lit_prune.fit.run import PruningRun, attribute_at, find_model
from lit_prune.masks.zeros import zero_shares
from lit_prune.models import structure
from lit_prune.recover import LoRA, MaskedLoRA, adapter_config
from tests.callbacks.test_dynamic_pruning import QUIET, Foreign, callback, loader
from tests.conftest import small_model
from tests.fit.cuts import prune_inside


def trainer_of(data: DataLoader) -> Trainer:
    trainer = Trainer(**QUIET, max_steps=4, enable_checkpointing=False)
    trainer.fit_loop._data_source.instance = data
    return trainer


def plan(**fields: Any) -> PruningRun:
    return PruningRun(callback(measure=False, **fields).fit_plan)


def test_a_cut_is_due_from_its_step_on_until_it_is_made() -> None:
    run = plan(at_step=[2, 4], sparsity=[0.2, 0.5], recovery=MaskedLoRA())
    assert [run.is_due(step) for step in (0, 1, 2, 3)] == [False, False, True, True]
    assert run.next_aim == "a sparsity of 0.2"
    run.done.append(None)  # type: ignore[arg-type]
    assert [run.is_due(step) for step in (2, 4)] == [False, True]
    assert run.next_aim == "a sparsity of 0.5"
    run.done.append(None)  # type: ignore[arg-type]
    assert run.next_cut is None
    assert not run.is_due(100)


def test_around_a_cut_the_adapter_before_it_is_merged_and_the_recovery_attached() -> None:
    run, model, trainer = plan(at_step=1, before=LoRA(r=2), recovery=LoRA(r=3)), small_model(), trainer_of(loader())
    run.prepare(trainer, model, None)
    run.begin(trainer, model)
    assert adapter_config(model)["r"] == 2  # type: ignore[index]
    with run.cutting(trainer, model) as made:
        assert adapter_config(model) is None
        assert all(parameter.requires_grad for parameter in model.parameters())  # as the module left them
        assert (made.inputs.step, made.inputs.recipe.sparsity, made.inputs.measured) == (1, 0.5, False)
        prune_inside(model, made)
        assert zero_shares(model)[1] == pytest.approx(0.5, abs=1e-3)
    assert adapter_config(model)["r"] == 3  # type: ignore[index]
    assert structure.record(model)["recovery"].startswith("LoRA(r=3")
    assert run.next_cut is None


def test_what_has_a_source_is_left_out_of_the_record_of_a_checkpoint() -> None:
    run, model, trainer = plan(), small_model(), trainer_of(loader())
    model.name_or_path = "somewhere"
    run.prepare(trainer, model, None)
    run.begin(trainer, model)
    with run.cutting(trainer, model) as made:
        prune_inside(model, made)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    record = run.record({"a": 1}, model, state, "model.")
    assert record.settings == {"a": 1}
    assert record.dropped_weights is not None
    assert all(".lora_" in name for name in state)
    assert record.dropped_weights.keys() | {name.removeprefix("model.") for name in state} == model.state_dict().keys()


def test_an_early_end_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    run = plan(at_step=3)
    run.warn_of_missing_cuts(2)
    line = "Warning: training ended at step 2, before the cut at step 3: 0 of 1 cuts were made."
    assert line in " ".join(capsys.readouterr().err.split())
    run.done.append(None)  # type: ignore[arg-type]
    run.warn_of_missing_cuts(4)
    assert capsys.readouterr().err == ""


def test_the_sparsity_of_the_last_cut_is_logged() -> None:
    logged: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append((values, step)))
    run = plan()
    run.done.append(SimpleNamespace(achieved=[0.25, 0.75], sparsity=0.5))  # type: ignore[arg-type]
    run.log_sparsity(SimpleNamespace(loggers=[logger], global_step=3))  # type: ignore[arg-type]
    assert logged == [({"pruning/sparsity": 0.5, "pruning/block_0": 0.25, "pruning/block_1": 0.75}, 3)]


def test_the_llm_is_found_at_a_dotted_path() -> None:
    module = Foreign()
    assert find_model(module, "model") is module.model
    assert attribute_at(module, "model.config.hidden_size") == 32
    assert attribute_at(module, "model.nothing.at.all") is None
    with pytest.raises(InputError, match="`pruning.target` must be the attribute of Foreign .*`net` is NoneType"):
        find_model(module, "net")
    assert torch.is_tensor(attribute_at(module, "model.lm_head.weight"))
