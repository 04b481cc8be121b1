"""A sparsity of all parameters, from the formula to the model."""

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, LayerRedundancy, Uniform
from lit_prune.allocate.budget import sparsity_of_linears
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.masks.zeros import zeros
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.slice import Slicing
from tests.conftest import small_model

PADDING = 32  # the embedding of the padding token is zero


def counts(model: PreTrainedModel) -> tuple[int, int]:
    """Weights of the linears, and all parameters."""
    return sum(block.size for block in find_blocks(model)), parameters(model)


def test_by_hand(model: PreTrainedModel) -> None:
    within, total = counts(model)
    assert (within, total) == (3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48), within + 64 * 32 + 7 * 32)  # head is tied
    bounds = {"lower": [0.0] * 3, "upper": 0.99}
    assert sparsity_of_linears(0.5, model, find_blocks(model), **bounds) == pytest.approx(
        (0.5 * total - PADDING) / within
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:8] = 0  # zeros outside of the linears count
    assert sparsity_of_linears(0.5, model, find_blocks(model), **bounds) == pytest.approx(
        (0.5 * total - 8 * 32) / within
    )


@pytest.mark.parametrize("allocation", [Uniform(), DLP(), LayerRedundancy()], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_that_share_of_all_parameters_is_zero(
    batches: list[torch.Tensor], allocation: DLP | Uniform | LayerRedundancy, tied: bool
) -> None:
    model = small_model(tie_word_embeddings=tied)
    within, total = counts(model)
    pruned = prune(model, batches, Recipe(Magnitude(), 0.5, allocation, budget="parameters"))
    zero, every = zeros(model.parameters())
    assert (every, zero / every) == (total, pytest.approx(0.5, abs=1e-3))
    assert pruned.target == pytest.approx((0.5 * total - zeros([model.model.embed_tokens.weight])[0]) / within)
    assert pruned.sparsity == pytest.approx(pruned.target, abs=1e-3)
    assert structure.record(model)["recipe"]["budget"] == "parameters"


def test_of_every_family(any_model: PreTrainedModel) -> None:
    prune(any_model, [], Recipe(Magnitude(), 0.4, Uniform(), budget="parameters"))
    zero, every = zeros(any_model.parameters())
    assert (every, zero / every) == (parameters(any_model), pytest.approx(0.4, abs=1e-3))


def test_linears_that_are_left_alone_give_nothing(batches: list[torch.Tensor], model: PreTrainedModel) -> None:
    prune(model, batches, Recipe(Magnitude(), 0.3, Uniform(), ignore=["q_proj"], budget="parameters"))
    zero, every = zeros(model.parameters())
    assert zero / every == pytest.approx(0.3, abs=1e-3)
    assert zeros(block.linears["self_attn.q_proj"].weight_OI for block in find_blocks(model))[0] == 0


def test_a_later_cut(batches: list[torch.Tensor], model: PreTrainedModel) -> None:
    prune(model, batches, Recipe(Magnitude(), 0.3, Uniform(), targets=["q_proj"]))
    prune(model, batches, Recipe(Magnitude(), 0.4, Uniform(), ignore=["q_proj"], budget="parameters"))
    zero, every = zeros(model.parameters())
    assert zero / every == pytest.approx(0.4, abs=1e-3)


def test_a_share_that_cannot_be_reached_says_what_can(batches: list[torch.Tensor], model: PreTrainedModel) -> None:
    within, total = counts(model)
    most = f"{(0.99 * within + PADDING) / total:.6f}"[:6]
    message = rf"must be between 0.0013 and {most} of all parameters with .* linears to prune, which are 91.0% of them"
    with pytest.raises(InputError, match=message):
        prune(model, batches, Recipe(sparsity=0.95, budget="parameters"))
    prune(model, batches, Recipe(Magnitude(), float(most), Uniform(), budget="parameters"))
    with pytest.raises(InputError, match=r"must be between 0.90\d* and .* got 0.3"):
        Recipe(sparsity=0.3, budget="parameters").check(model)


def test_only_for_what_sets_weights_to_zero() -> None:
    assert Recipe(Slicing()).budget == "linears"
    with pytest.raises(InputError, match="`pruning.budget` must be linears for Slicing, whose rates do not tell"):
        Recipe(Slicing(), budget="parameters")


def test_an_unknown_budget() -> None:
    with pytest.raises(InputError, match="`pruning.budget` must be one of linears, parameters, bytes, got 'weights'"):
        Recipe(budget="weights")  # type: ignore[arg-type]
