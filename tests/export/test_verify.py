"""An export that is not what is in memory is found out, whatever it is that differs."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import Measurement, Protocol, measure
from lit_prune.export.formats import HuggingFace
from lit_prune.export.plan import ExportPlan
from lit_prune.export.verify import Verification, check_trained, verify
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, Recovery
from lit_prune.slice import Slicing
from tests.conftest import export, small_model

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


def perplexity(model: PreTrainedModel) -> float:
    return measure(model, batches(), "text").perplexity


def check(folder: Path, plan: ExportPlan, expected: float | None = None, **fields: Any) -> Verification:
    """Verifies a folder of a model that the recipe cut, half of every block."""
    validation = None if expected is None else (batches(), "text")
    return verify(folder, plan, HuggingFace(), validation, perplexity=expected, **{"achieved": [0.5] * 3, **fields})


@pytest.mark.parametrize("recovery", [None, LoRA(), MaskedLoRA(), FullFineTuning()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_record_of_a_folder_that_is_right(recovery: Recovery, dtype: torch.dtype, tmp_path: Path) -> None:
    model = recovered(recovery, dtype)
    result = check(tmp_path, export(model, tmp_path), perplexity(model))
    assert result.format == "HuggingFace"
    assert result.merged is isinstance(recovery, MaskedLoRA)
    assert result.adapter_beside is (tmp_path / "adapter_config.json").exists() is isinstance(recovery, LoRA)
    assert result.zeros_expected == result.zeros_found == ALL // 2
    # in half precision the small model's rotary frequencies are rounded with it, the opened one's are not
    assert result.max_logit_difference < (1e-5 if dtype == torch.float32 else 1e-2)
    assert result.perplexity == pytest.approx(perplexity(model), rel=1e-3)


def test_the_record_as_the_report_has_it() -> None:
    result = Verification("HuggingFace", False, True, 5, 6, 1e-6, 20.5)
    assert result.to_dict() == {
        "verified": True,
        "format": "HuggingFace",
        "merged": False,
        "adapter": "unmerged, at the root of model/",
        "zeros_expected": 5,
        "zeros_found": 6,
        "max_logit_difference": 1e-6,
        "perplexity": 20.5,
    }
    assert "perplexity" not in replace(result, perplexity=None).to_dict()
    assert replace(result, merged=True, adapter_beside=False).to_dict()["adapter"] == "merged"
    assert replace(result, adapter_beside=False).to_dict()["adapter"] is None


def test_without_validation_the_logits_are_still_compared(tmp_path: Path) -> None:
    result = check(tmp_path, export(recovered(MaskedLoRA()), tmp_path))
    assert result.max_logit_difference < 1e-5
    assert result.perplexity is None


def test_a_sliced_model_has_no_zeros_to_count(tmp_path: Path) -> None:
    model = small_model()
    prune(model, batches(), Recipe(Slicing(), 0.25))
    LoRA().attach(model)
    result = check(tmp_path, export(model, tmp_path))
    assert result.merged
    assert result.zeros_expected is result.zeros_found is None


def test_weights_that_are_not_read_as_they_were_written(tmp_path: Path) -> None:
    plan = export(recovered(), tmp_path)
    plan.plain.model.norm.weight.data[0] += 1e-4
    with pytest.raises(RuntimeError, match=r"the exported model's model.norm.weight is not what was written"):
        check(tmp_path, plan)


def test_zeros_that_were_filled(tmp_path: Path) -> None:
    model = recovered()
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data[weight == 0] = 1e-6
    with pytest.raises(
        RuntimeError, match=rf"{(ALL - 32 * 32) // 2} zeros in the pruned linears, .* memory {ALL // 2};"
    ):
        check(tmp_path, export(model, tmp_path))


def test_an_adapter_that_was_left_out(tmp_path: Path) -> None:
    plan, other = ExportPlan.of(recovered(MaskedLoRA())), export(recovered(), tmp_path)
    with pytest.raises(RuntimeError, match=r"logits differ by .*, more than the .* that rounding explains; not kept"):
        check(tmp_path, replace(plan, plain=other.plain))


def test_a_perplexity_that_differs(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the exported model's perplexity is .*, in memory it is 1.0000; not kept"):
        check(tmp_path, export(recovered(), tmp_path), 1.0)


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
def test_a_perplexity_that_is_no_number(
    found: float, expected: float, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = export(recovered(), tmp_path)
    monkeypatch.setattr(
        "lit_prune.export.verify.measure",
        lambda *args, **fields: Measurement(found, Protocol("text", 1, 16, 15, "float32"), 0.0),
    )
    with nullcontext() if right else pytest.raises(RuntimeError, match=r"the exported model's perplexity is"):
        assert check(tmp_path, plan, expected).perplexity == found


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_training_that_diverged(value: float) -> None:
    model = recovered(LoRA())
    for measured in (None, 30.0, math.inf):
        check_trained(model, measured)
    with pytest.raises(InputError, match=r"`model.lr` must be lower: the training diverged, the perplexity is NaN;"):
        check_trained(model, math.nan)
    name, adapter = next((name, weight) for name, weight in model.named_parameters() if ".lora_B" in name)
    adapter.data[0, 0] = value
    with pytest.raises(InputError, match=rf"`model.lr` must be lower: the training diverged, {name} is not finite;"):
        check_trained(model)


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    model = recovered()
    model.model.norm.weight.data.fill_(3e38)
    with pytest.raises(InputError, match=r"the model's logits are not finite, .* `model.lr` must be lower"):
        check(tmp_path, export(model, tmp_path))
