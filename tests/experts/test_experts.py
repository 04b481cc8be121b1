"""Cuts that remove experts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lit_prune.allocate import DLP, Plan, Uniform
from lit_prune.allocate.plan import write_plan
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.experts import Experts
from lit_prune.masks.zeros import zeros
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune, score
from lit_prune.pruning import Method, Wanda
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct
from lit_prune.shrink import HeadGroups, Shrink
from tests.conftest import lively_model, multimodal_model, small_model
from tests.experts.models import MIXTURES, mixture_model

PAIRS = Experts(multiple=2)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_folder_is_of_the_familys_own_class(family: str, batches: list[Tensor], tmp_path: Path) -> None:
    model = mixture_model(family)
    kind, before = type(model), parameters(model)
    mixtures = [size > 0 for size in PAIRS.sizes(model, find_blocks(model))]
    pruned = prune(model, batches, Recipe(PAIRS, 1 / 3, Uniform()))
    assert pruned.achieved == pytest.approx([mixture / 3 for mixture in mixtures])
    assert parameters(model) < before
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is kind
    assert list(tmp_path.glob("*.py")) == []
    torch.testing.assert_close(opened(batches[0]).logits, model(batches[0]).logits, rtol=1e-5, atol=1e-5)
    generated = opened.generate(batches[0], max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 18)


def test_an_expert_that_is_never_chosen_goes_and_changes_nothing(batches: list[Tensor]) -> None:
    model = mixture_model("mixtral")
    for layer, idle in zip(model.model.layers, (0, 5, 2), strict=True):
        layer.post_attention_layernorm.register_forward_hook(
            lambda _module, _args, x: F.pad(x[..., 1:], (1, 0), value=1.0)
        )
        layer.mlp.gate.weight.data[:, 0] = 0
        layer.mlp.gate.weight.data[idle, 0] = -100  # the first entry of the router's input is 1
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(batches[0]).logits
    pruned = prune(model, batches, Recipe(Experts(), 1 / 6, Uniform()))
    assert pruned.sparsity == pytest.approx(1 / 6)
    for index, idle in enumerate((0, 5, 2)):
        name = f"model.layers.{index}.mlp.experts.down_proj"
        rest = [expert for expert in range(6) if expert != idle]
        assert torch.equal(model.state_dict()[name], dense[name][rest])
    torch.testing.assert_close(model(batches[0]).logits, expected, rtol=1e-5, atol=1e-5)


def test_groups_lose_as_many_each(batches: list[Tensor]) -> None:
    model, dense = mixture_model("deepseek_v3"), mixture_model("deepseek_v3")
    prune(model, batches, Recipe(PAIRS, 1 / 3, Uniform()))
    rows = dense.model.layers[2].mlp.gate.weight
    kept = [int((rows == row).all(1).nonzero()) for row in model.model.layers[2].mlp.gate.weight]
    assert kept == sorted(kept)
    assert [sum(expert < 3 for expert in kept), len(kept)] == [2, 4]


def test_a_second_cut_counts_the_first(batches: list[Tensor]) -> None:
    model = mixture_model()
    prune(model, batches, Recipe(Experts(), 1 / 3, Uniform()))
    with pytest.raises(InputError, match="must be at least the current sparsity"):
        prune(model, batches, Recipe(Experts(), 1 / 6, Uniform()))
    pruned = prune(model, batches, Recipe(Experts(), 0.5, Uniform()))
    assert (pruned.sparsity_before, pruned.sparsity) == (pytest.approx(1 / 3), pytest.approx(0.5))
    (recorded,) = structure.structures(model)
    assert vars(recorded) == {"experts": 3, "full": 6, "path": "model.layers"}
    assert (model.config.num_local_experts, model.num_experts) == (3, 3)


def test_the_plan_of_a_model_with_a_block_without_a_mixture(batches: list[Tensor], tmp_path: Path) -> None:
    model, recipe = mixture_model("qwen3_moe"), Recipe(Experts(), 1 / 3, Uniform())
    scored = score(model, batches, recipe)
    write_plan(tmp_path / "plan.yaml", scored.rates, scored.scores, "Rates of a test.")
    plan = Plan(str(tmp_path / "plan.yaml"))
    assert prune(model, batches, replace(recipe, allocation=plan)).achieved == pytest.approx([1 / 3, 0, 1 / 3])
    write_plan(tmp_path / "plan.yaml", [1 / 2, 0, 1 / 6], scored.scores, "Other rates.")
    with pytest.raises(InputError, match="`pruning.allocation` must be Uniform for Experts, got Plan"):
        replace(recipe, allocation=plan).check(mixture_model("qwen3_moe"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_share_of_all_parameters(family: str, batches: list[Tensor]) -> None:
    model = mixture_model(family)
    before, expert = parameters(model), {"mixtral": 3 * (3 * 32 * 48 + 32), "qwen3_moe": 2 * (3 * 32 * 24 + 32)}[family]
    for share in (0.1, 0.2):
        prune(model, batches, Recipe(Experts(), share, Uniform(), budget="parameters"))
        assert abs(1 - parameters(model) / before - share) <= expert / 2 / before + 1e-9
    with pytest.raises(InputError, match=r"must be between 0\.\d+ and 0\.\d+ of all parameters .* for the experts"):
        Recipe(Experts(), 0.65, Uniform(), budget="parameters").check(model)


def test_masks_stay_and_can_follow(batches: list[Tensor]) -> None:
    model = mixture_model()
    prune(model, batches, Recipe(Wanda(), 0.5, Uniform()))
    prune(model, batches, Recipe(Experts(), 0.5, Uniform()))
    blocks = find_blocks(model)
    zero, total = zeros(linear.weight_OI for block in blocks for linear in block.linears.values())
    assert zero / total == pytest.approx(0.5, abs=1e-3)
    assert prune(model, batches, Recipe(Wanda(), 0.6, DLP())).sparsity == pytest.approx(0.6, abs=1e-3)


def test_blocks_are_reconstructed(batches: list[Tensor]) -> None:
    model = mixture_model()
    recipe = Recipe(Experts(), 0.5, Uniform(), reconstruction=Reconstruct(epochs=1))
    assert len(prune(model, batches, recipe).reconstruction) == 3


@pytest.mark.parametrize(
    ("method", "family", "fields", "sparsity", "message"),
    [
        (Experts(), "llama", {}, 0.5, "Experts needs a mixture of experts; the family 'llama' has none"),
        (
            Experts(),
            "mixtral",
            {},
            0.6,
            r"at most 0\.5 for Experts, got 0\.6: every mixture keeps 2 of 4 experts, since the router picks 2",
        ),
        (Experts(), "deepseek_v3", {}, 0.1, r"`Experts.multiple` must be a multiple of 2 .* 2 groups .* got 1"),
        (
            Experts(multiple=4),
            "mixtral",
            {},
            0.5,
            r"`Experts.multiple` must be less than 4, the number of experts of a",
        ),
        (PAIRS, "deepseek_v3", {}, 0.5, r"at most 0 for Experts, got 0\.5: every mixture keeps 4 of 4 experts"),
    ],
)
def test_what_is_refused(method: Method, family: str, fields: dict[str, Any], sparsity: float, message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        Recipe(method, sparsity, Uniform()).check(small_model(family, **fields))
    assert "\n" not in str(told.value)


def test_a_number_for_each_block_is_refused() -> None:
    with pytest.raises(InputError, match="`pruning.allocation` must be Uniform for Experts, got DLP"):
        Recipe(Experts(), 0.5, DLP()).check(small_model("mixtral"))


def test_settings() -> None:
    with pytest.raises(InputError, match=r"`Experts.multiple` must be at least 1, got 0"):
        Experts(multiple=0)


def test_a_vision_tower_has_none() -> None:
    with pytest.raises(InputError, match="the family 'gemma3' has none"):
        Recipe(Experts(), 0.5, Uniform()).check(multimodal_model())


def test_the_loss_of_the_router_knows_the_number(batches: list[Tensor]) -> None:
    model = lively_model("mixtral", num_local_experts=6)
    prune(model, batches, Recipe(Experts(), 0.5, Uniform()))
    assert model(batches[0], labels=batches[0], output_router_logits=True).aux_loss.isfinite()


def test_experts_and_groups_under_one_budget(batches: list[Tensor]) -> None:
    """Experts have more parameters than groups, so that they are rounded first, and the groups make up for it."""
    model = lively_model("mixtral", num_key_value_heads=4, num_local_experts=6)
    before = parameters(model)
    recipe = Recipe(Shrink([Experts(), HeadGroups()]), allocation=Uniform(), target_parameters=round(0.65 * before))
    prune(model, batches, recipe)
    experts, groups = model.config.num_local_experts, model.config.num_key_value_heads
    assert (experts < 6, groups < 4) == (True, True)
    one_group = 3 * 4 * 8 * 32  # of 8 rows or columns of four matrices, in 3 blocks
    assert abs(parameters(model) - 0.65 * before) <= one_group / 2
