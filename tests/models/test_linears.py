import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models.linears import linears_of, watching
from lit_prune.recipe import Recipe
from tests.conftest import small_model

SEEN = list[tuple[str, torch.Tensor, torch.Tensor | None]]


def block(family: str) -> nn.Module:
    return next(small_model(family).get_submodule("transformer.h" if family == "gpt2" else "model.layers").children())


def test_a_conv1d_is_read_and_written_turned_round() -> None:
    layer = block("gpt2")
    linear = linears_of(layer)["attn.c_attn"]
    assert tuple(linear.weight_OI.shape) == (96, 32)
    assert tuple(layer.attn.c_attn.weight.shape) == (32, 96)
    linear.write(torch.arange(96 * 32.0).view(96, 32))
    assert layer.attn.c_attn.weight[:, 0].tolist() == list(range(32))


def test_an_expert_is_a_slice() -> None:
    experts = block("mixtral").mlp.experts
    before = experts.down_proj.detach().clone()
    linear = linears_of(experts)[".2.down_proj"]
    assert torch.equal(linear.weight_OI, before[2])
    linear.write(torch.zeros(32, 48))
    assert not experts.down_proj[2].any()
    assert torch.equal(experts.down_proj[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_names_are_unique_and_nothing_carries_a_gradient(family: str) -> None:
    linears = linears_of(block(family))
    assert all(name == linear.name for name, linear in linears.items())
    assert all(linear.parameter.requires_grad and not linear.weight_OI.requires_grad for linear in linears.values())


def watched(experts: nn.Module, *args: torch.Tensor) -> tuple[torch.Tensor, SEEN]:
    seen: SEEN = []
    with torch.no_grad(), watching(linears_of(experts).values(), lambda *given: seen.append(given)):
        return experts(*args), seen


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_told_what_they_are_given(family: str) -> None:
    experts = block(family).mlp.experts
    x_PI = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    choice_PK = torch.tensor([[0, 2], [2, 0], [2, 3]])  # expert 0 sees tokens 0 and 1, expert 1 none
    weight_PK = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])
    with torch.no_grad():
        expected = experts(x_PI, choice_PK, weight_PK)
    y_PI, seen = watched(experts, x_PI, choice_PK, weight_PK)
    torch.testing.assert_close(y_PI, expected)
    given = {name: (x, rows) for name, x, rows in seen}
    assert len(seen) == len(given) == 8
    assert {name: rows.tolist() for name, (_, rows) in given.items() if "gate_up" in name} == {
        ".0.gate_up_proj": [0, 1],
        ".1.gate_up_proj": [],
        ".2.gate_up_proj": [0, 1, 2],
        ".3.gate_up_proj": [2],
    }
    torch.testing.assert_close(given[".3.gate_up_proj"][0], x_PI[2:])
    gate, up = nn.functional.linear(x_PI[2:], experts.gate_up_proj[3]).chunk(2, dim=-1)
    torch.testing.assert_close(given[".3.down_proj"][0], nn.functional.silu(gate) * up)


def test_modules_are_as_before_afterwards() -> None:
    layer = block("mixtral")
    with watching(linears_of(layer).values(), lambda *_: None):
        assert "forward" in layer.mlp.experts.__dict__
    assert "forward" not in layer.mlp.experts.__dict__
    assert not any(module._forward_pre_hooks for module in layer.modules())


def test_experts_of_another_layout_are_refused_unless_they_are_left_alone() -> None:
    model = small_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True
    told = r"`model` must have experts of two fused parameters, .*MixtralExperts.*`--pruning.ignore '\[mlp.experts\]'`"
    with pytest.raises(InputError, match=told):
        Recipe().find(model)
    for pattern in ("experts", "mlp.experts"):
        linears = Recipe(ignore=[pattern]).find(model)[0].linears
        assert set(linears) == {f"self_attn.{name}_proj" for name in "qkvo"}
    assert set(Recipe(ignore=["experts"]).find(small_model("mixtral"))[0].linears) == set(linears)


def test_convolutions_are_no_experts() -> None:
    assert linears_of(nn.Conv1d(4, 4, 2)) == {}
