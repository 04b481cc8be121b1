"""Linears that stay in float32, and adapters that learn inside a model in half precision."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_prune.masks.zeros import zeros
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, MaskedLoRA, QLoRA, Recovery
from lit_prune.recover.layers.float32 import Float32Linear, MasterAdamW, adamw
from lit_prune.recover.merge import without_adapter
from tests.conftest import WIDE, export, small_model

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


def test_bfloat16_learns_what_float32_learns_where_plain_adamw_learns_nothing() -> None:
    given = {"lr": 1e-3, "betas": (0.9, 0.95)}
    ends = []
    for kind, dtype in ((MasterAdamW, torch.bfloat16), (torch.optim.AdamW, torch.bfloat16), (MasterAdamW, None)):
        weight = nn.Parameter(torch.ones(2, 3, dtype=dtype or torch.float32))
        optimizer = kind([weight], **given, weight_decay=0.0)  # type: ignore[operator]
        for _ in range(8):  # a constant gradient: every step is -lr
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends.append(weight.detach().float())
    assert torch.equal(ends[0], torch.full((2, 3), 0.9921875))  # 0.992, rounded to bfloat16
    assert torch.equal(ends[1], torch.ones(2, 3))
    torch.testing.assert_close(ends[2], torch.full((2, 3), 0.992))


def test_in_float32_it_is_torchs_adamw_to_the_bit() -> None:
    ends = []
    for kind in (MasterAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        weight, random = nn.Parameter(torch.randn(4, 5)), torch.Generator().manual_seed(1)
        optimizer = kind([weight], lr=1e-2, weight_decay=0.1)
        for _ in range(5):
            weight.grad = torch.randn(4, 5, generator=random)
            optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_a_resumed_optimizer_goes_on_to_the_bit() -> None:
    def steps(optimizer: torch.optim.Optimizer, weight: Tensor, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        for _ in range(5):
            weight.grad = torch.randn(4, 5, generator=random).bfloat16()
            optimizer.step()

    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(4, 5).bfloat16())
    optimizer = MasterAdamW([first], lr=1e-3)
    steps(optimizer, first, 1)
    second = nn.Parameter(first.detach().clone())
    resumed = MasterAdamW([second], lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {value.dtype for value in resumed.state[second].values()} == {torch.float32}
    for given, weight in ((optimizer, first), (resumed, second)):
        steps(given, weight, 2)
    assert torch.equal(first, second)
    assert torch.equal(optimizer.state[first]["master"], resumed.state[second]["master"])


def test_weights_that_were_cut_since_the_last_step_are_not_restored() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        weight.grad = torch.tensor([0.0, 1.0], dtype=torch.bfloat16)
        optimizer.step()
        weight.data[0] = 0
    assert weight[0] == 0
    assert optimizer.state[weight]["master"].tolist() == pytest.approx([0, 0.998])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_optimizer_of_parameters_by_their_type(dtype: torch.dtype) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2, dtype=dtype))]}]
    assert isinstance(adamw(groups, 1e-3, (0.9, 0.95)), torch.optim.AdamW if dtype == torch.float32 else MasterAdamW)
