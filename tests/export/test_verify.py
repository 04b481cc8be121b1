"""An export that is not what is in memory is found out, whatever it is that differs."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import Measurement, Protocol, measure
from lit_prune.export.folder import export
from lit_prune.export.verify import _compare_perplexity, check_trained, verify
from lit_prune.pipeline import prune
from lit_prune.prune import Magnitude
from lit_prune.recipe import Recipe, recipe_record
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, Recovery
from lit_prune.report.records import CutRecord
from lit_prune.report.summary import summary
from lit_prune.slice import Slicing
from tests.conftest import small_model

RECIPE = Recipe(Magnitude(), 0.5, Uniform(), ignore=["down_proj"])
ALL = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 48 * 32)


def batches() -> list[Batch]:
    ids = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids}]


def recovered(recovery: Recovery | None = None, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    model = small_model(**fields).to(dtype)  # type: ignore[arg-type]
    prune(model, batches(), RECIPE)
    if recovery is not None:
        recovery.attach(model)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def report_of(model: PreTrainedModel, recipe: Recipe = RECIPE) -> dict[str, Any]:
    found = measure(model, batches(), "text")
    cut = CutRecord(
        step=0,
        perplexity={"after": found.perplexity},
        seconds={},
        protocol=found.protocol,
        calibration={},
        size={},
        recipe=recipe_record(recipe),
        scores=[1.0] * 3,
        rates=[0.5] * 3,
        target=recipe.sparsity,
        achieved=[0.5] * 3,
        sparsity=recipe.sparsity,
    )
    return summary(model, recipe, [cut])


@pytest.mark.parametrize("recovery", [None, LoRA(), MaskedLoRA(), FullFineTuning()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_said_of_a_folder_that_is_right(recovery: Recovery, dtype: torch.dtype, tmp_path: Path) -> None:
    model = recovered(recovery, dtype)
    report = report_of(model)
    said = verify(tmp_path, model, export(model, tmp_path), report, (batches(), "text"))
    assert said["verified"]
    assert said["merged"] is isinstance(recovery, MaskedLoRA)
    assert said["zeros_expected"] == said["zeros_found"] == ALL // 2
    # in half precision the small model's rotary frequencies are rounded with it, the opened one's are not
    assert said["max_logit_difference"] < (1e-5 if dtype == torch.float32 else 1e-2)
    assert said["perplexity"] == pytest.approx(report["perplexity"]["pruned"], abs=0.01)
    assert (tmp_path / "adapter_config.json").exists() is isinstance(recovery, LoRA)


def test_without_validation_the_logits_are_compared_all_the_same(tmp_path: Path) -> None:
    model = recovered(MaskedLoRA())
    said = verify(tmp_path, model, export(model, tmp_path), report_of(model), None)
    assert said["max_logit_difference"] < 1e-5
    assert "perplexity" not in said


def test_a_sliced_model_has_no_zeros_to_count(tmp_path: Path) -> None:
    model, recipe = small_model(), Recipe(Slicing(), 0.25)
    prune(model, batches(), recipe)
    LoRA().attach(model)
    said = verify(tmp_path, model, export(model, tmp_path), report_of(model, recipe), None)
    assert said["merged"]
    assert said["zeros_expected"] is said["zeros_found"] is None


def test_weights_that_were_not_written_so(tmp_path: Path) -> None:
    model = recovered()
    written = export(model, tmp_path)
    report = report_of(model)
    written.model.norm.weight.data[0] += 1e-4
    with pytest.raises(RuntimeError, match=r"the exported model's model.norm.weight is not what was written"):
        verify(tmp_path, model, written, report, None)


def test_zeros_that_were_filled(tmp_path: Path) -> None:
    model = recovered()
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data[weight == 0] = 1e-6
    written = export(model, tmp_path)
    with pytest.raises(RuntimeError, match=rf"has {(ALL - 32 * 32) // 2} zeros in the pruned linears of {ALL // 2};"):
        verify(tmp_path, model, written, report_of(model), None)


def test_an_adapter_that_was_left_out(tmp_path: Path) -> None:
    model = recovered(MaskedLoRA())
    report = report_of(model)
    plain = small_model()
    prune(plain, batches(), RECIPE)
    with pytest.raises(RuntimeError, match=r"logits differ by .* from those in memory, where .* is rounding"):
        verify(tmp_path, model, export(plain, tmp_path), report, (batches(), "text"))


def test_a_perplexity_that_was_another(tmp_path: Path) -> None:
    model = recovered()
    report = report_of(model) | {"perplexity": {"pruned": 1.0}}
    with pytest.raises(RuntimeError, match=r"the exported model's perplexity is .*, in memory it is 1.0000; not kept"):
        verify(tmp_path, model, export(model, tmp_path), report, (batches(), "text"))


@pytest.mark.parametrize(
    ("found", "expected", "right"),
    [
        (20.01, 20.0, True),
        (20.1, 20.0, False),
        (math.nan, 20.0, False),
        (20.0, math.nan, False),
        (math.inf, 20.0, False),
        (20.0, math.inf, False),
        (math.inf, math.inf, True),
    ],
)
def test_a_perplexity_that_is_no_number_is_another(
    found: float, expected: float, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lit_prune.export.verify.measure",
        lambda *args, **fields: Measurement(found, Protocol("text", 1, 16, 15, "float32"), 0.0),
    )
    with nullcontext() if right else pytest.raises(RuntimeError, match=r"the exported model's perplexity is"):
        said = _compare_perplexity(small_model(), {"perplexity": {"pruned": expected}}, (batches(), "text"), None)
        assert said == {"perplexity": found}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_training_that_diverged(value: float) -> None:
    model = recovered(LoRA())
    report: dict[str, Any] = {"seconds": {"train": 1.0}, "perplexity": {"pruned": 60.0, "recovered": 30.0}}
    check_trained(model, report)
    check_trained(model, report | {"perplexity": {"pruned": math.nan, "recovered": None, "after": math.inf}})
    with pytest.raises(InputError, match=r"`model.lr` must be lower: the training diverged, the perplexity is NaN;"):
        check_trained(model, report | {"perplexity": {"pruned": 60.0, "recovered": math.nan}})
    name, adapter = next((name, weight) for name, weight in model.named_parameters() if ".lora_B" in name)
    adapter.data[0, 0] = value
    with pytest.raises(InputError, match=rf"`model.lr` must be lower: the training diverged, {name} is not finite;"):
        check_trained(model, report)
    check_trained(model, report | {"seconds": {"prune": 1.0}})


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    model = recovered()
    model.model.norm.weight.data.fill_(3e38)
    with pytest.raises(InputError, match=r"the model's logits are not finite, .* `model.lr` must be lower"):
        verify(tmp_path, model, export(model, tmp_path), report_of(model), None)
