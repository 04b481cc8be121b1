"""Linears that stay in float32, and adapters that learn inside a model in half precision."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_prune.export.folder import export
from lit_prune.masks.zeros import zeros
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, MaskedLoRA, QLoRA, Recovery
from lit_prune.recover.float32 import Float32Linear
from lit_prune.recover.merge import without_adapter
from tests.conftest import WIDE, small_model

HALF = [torch.float16, torch.bfloat16]
RECOVERIES = [LoRA(), MaskedLoRA(), QLoRA(), QLoRA(form="merged"), QLoRA(quantization="int8")]


@pytest.mark.parametrize("dtype", HALF)
def test_a_cast_of_the_model_leaves_it_in_float32_to_the_bit(dtype: torch.dtype) -> None:
    linear = nn.Linear(3, 2, bias=False)
    model = nn.Sequential(Float32Linear.from_linear(linear), nn.Linear(2, 2))
    model.to(dtype)
    assert torch.equal(model[0].weight, linear.weight)
    assert model[1].weight.dtype == dtype
    model.to("meta", dtype)
    assert (model[0].weight.dtype, model[0].weight.device.type) == (torch.float32, "meta")


def test_half_precision_is_widened_and_float64_is_kept() -> None:
    half = nn.Linear(3, 2).half()
    half.weight.requires_grad_(False)
    wide = Float32Linear.from_linear(half.eval())
    assert torch.equal(wide.weight, half.weight.float())
    assert not wide.weight.requires_grad
    assert not wide.training
    assert wide.bias.requires_grad
    assert Float32Linear.from_linear(nn.Linear(3, 2).double()).weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("recovery", RECOVERIES, ids=str)
def test_adapters_of_a_model_in_half_precision_learn(
    recovery: Recovery, dtype: torch.dtype, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model = small_model(**WIDE).to(dtype)  # type: ignore[arg-type]
    prune(model, batches, Recipe(sparsity=0.5))
    pruned = sum(block.pruned for block in find_blocks(model))
    recovery.attach(model)
    model.to(dtype)  # type: ignore[arg-type]  # as Lightning's 16-true and bf16-true do
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained.items())
    assert model.dtype == dtype
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=5e-3), []
    for _ in range(20):
        loss = model(batches[0], labels=batches[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    assert all(parameter.isfinite().all() for parameter in trained.values())
    export(model, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.dtype == dtype
    blocks = find_blocks(without_adapter(opened), quantised=True)
    assert zeros(linear.weight_OI for block in blocks for linear in block.linears.values())[0] >= pruned
