"""The form of an export follows from the adapter and the masks, and the models of a run are worked out once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lit_prune.callbacks import ResultsCallback
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.allocate import DLP, Allocation, LayerRedundancy, Uniform
from lit_prune.errors import InputError
from lit_prune.export import plan as plans
from lit_prune.export.plan import ExportPlan, Outline, check_merge
from lit_prune.pipeline import prune
from lit_prune.pruning import Method
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA, Recovery, Snapshot
from lit_prune.recover.existing_masks import attach
from lit_prune.shrink import MLPWidth
from lit_prune.slice import Slicing
from tests.callbacks.test_dynamic_pruning import Foreign, callback, fit, loader
from tests.conftest import small_model

MASKS, SLICES = Recipe(), Recipe(Slicing(), 0.25)


def recovered(recipe: Recipe | None, recovery: Recovery | None, batches: list[torch.Tensor]) -> PreTrainedModel:
    """A small model, cut and under an adapter that does something."""
    model = small_model()
    if recipe is not None:
        prune(model, batches, recipe)
    if recovery is not None:
        recovery.attach(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize(
    ("recipe", "recovery", "form"),
    [
        (MASKS, None, "full precision"),
        (None, LoRA(), "merged"),
        (MASKS, LoRA(), "adapter"),
        (SLICES, LoRA(), "merged"),
        (MASKS, MaskedLoRA(), "merged"),
        (MASKS, FullFineTuning(), "full precision"),
        (MASKS, QLoRA(quantization="int8", form="adapter"), "adapter"),
        (MASKS, QLoRA(quantization="int8", form="merged"), "merged"),
        (MASKS, QLoRA(quantization="int8", form="requantised"), "requantised"),
        (SLICES, QLoRA(quantization="int8", form="merged"), "merged"),
    ],
)
def test_the_form_follows_from_adapter_and_masks(
    recipe: Recipe | None, recovery: Recovery | None, form: str, batches: list[torch.Tensor]
) -> None:
    model = recovered(recipe, recovery, batches)
    plan = ExportPlan.of(model)
    quantised = isinstance(recovery, QLoRA) and form != "merged"
    shape = {"masked": recipe is MASKS, "reshaped": recipe is SLICES, "quantised": quantised}
    shape |= {"custom_class": "sliced" if recipe is SLICES else None}
    assert plan.outline == Outline(form, "llama", **shape)  # type: ignore[arg-type]
    assert Outline.expected(small_model(), recipe, recovery) == plan.outline
    assert plan.merged is (form in ("merged", "requantised"))
    assert plan.adapter_beside is (form == "adapter")
    assert plan.reference is (plan.plain if form == "requantised" else model)
    assert (plan.plain is plan.base) is not plan.merged
    assert not any("lora" in name for name in (*plan.plain.state_dict(), *plan.base.state_dict()))


@pytest.mark.parametrize(
    ("before", "recovery"),
    [
        (None, None),
        (None, LoRA()),
        (None, MaskedLoRA()),
        (None, FullFineTuning()),
        (LoRA(), LoRA()),
        (QLoRA(quantization="int8"), LoRA()),
    ],
)
def test_the_outline_of_a_model_that_is_only_trained_is_known_before(
    before: Recovery | None, recovery: Recovery | None, batches: list[torch.Tensor]
) -> None:
    model = recovered(MASKS, before, batches)
    expected = Outline.expected(model, None, recovery)
    attach(model, recovery)
    assert expected == Outline.of(model)


def test_bytes_are_those_of_what_is_written(batches: list[torch.Tensor]) -> None:
    dense = ExportPlan.of(recovered(None, None, batches)).bytes
    assert dense == 4 * sum(parameter.numel() for parameter in small_model().parameters())
    assert ExportPlan.of(recovered(MASKS, MaskedLoRA(), batches)).bytes == dense
    adapter = 2 * 3 * 4 * 8 * (32 + 32)  # A and B, blocks, bytes, rank: q_proj alone
    beside = ExportPlan.of(recovered(MASKS, LoRA(target_modules=["q_proj"]), batches))
    assert beside.bytes == dense + adapter // 2
    packed = [ExportPlan.of(recovered(MASKS, QLoRA(quantization="int8", form=form), batches)).bytes for form in FORMS]
    assert packed[0] == dense
    assert packed[1] < dense / 2


FORMS: list[Any] = ["merged", "requantised"]


def test_a_merge_that_would_fill_zeros_is_refused(batches: list[torch.Tensor]) -> None:
    check_merge(Snapshot.of(recovered(MASKS, None, batches)))
    check_merge(Snapshot.of(recovered(SLICES, LoRA(), batches)))
    with pytest.raises(InputError, match="`merge` must be left out for LoRA over masks, .*or train with .*MaskedLoRA"):
        check_merge(Snapshot.of(recovered(MASKS, LoRA(), batches)))
    with pytest.raises(InputError, match="`merge` must be left out for an adapter that was trained to stay beside"):
        check_merge(Snapshot.of(recovered(MASKS, QLoRA(quantization="int8"), batches)))


@pytest.mark.parametrize("recovery", [LoRA(), MaskedLoRA(), QLoRA(quantization="int8", form="requantised")])
def test_a_run_merges_and_takes_off_the_adapter_once(
    recovery: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calls = Foreign(), []

    def counted(function: Any) -> Any:
        def call(model: PreTrainedModel) -> PreTrainedModel:
            if model is module.model:  # and not the one that is reopened
                calls.append(function.__name__)
            return function(model)

        return call

    for name in ("without_adapter", "merged"):
        for place in (plans, "lit_prune.export.verify", "lit_prune.report.summary", "lit_prune.report.write"):
            target = f"{place if isinstance(place, str) else place.__name__}.{name}"
            monkeypatch.setattr(target, counted(getattr(plans, name)), raising=False)
    fit(module, callback(recovery=recovery), loader(1), callbacks=[ResultsCallback(str(tmp_path / "run"))], max_steps=1)
    assert (tmp_path / "run" / "model").is_dir()
    assert sorted(calls) == (["without_adapter"] if isinstance(recovery, LoRA) else ["merged", "without_adapter"])


def test_blocks_are_of_different_sizes_unless_the_rates_are_uniform() -> None:
    def expected(allocation: Allocation, model: PreTrainedModel) -> str | None:
        outline = Outline.expected(model, Recipe(MLPWidth(), 0.25, allocation), None)
        assert outline is not None
        return outline.custom_class

    assert expected(Uniform(), small_model()) is None
    assert expected(DLP(), small_model()) == "shrunk"
    shrunk = small_model(
        "shrunk_llama", block_sizes={"num_key_value_heads": [1, 2, 2], "num_attention_heads": [2, 4, 4]}
    )
    assert expected(Uniform(), shrunk) == Outline.of(shrunk).custom_class == "shrunk"


@pytest.mark.parametrize(("method", "kind"), [(MLPWidth(multiple=8), "shrunk"), (Slicing(multiple=8), "sliced")])
def test_a_model_that_was_read_and_cut_is_of_its_new_class(
    method: Method, kind: str, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    small_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prune(model, batches, Recipe(method, 0.25, LayerRedundancy()))
    assert Outline.of(model).custom_class == kind
