"""The greatest sparsity that keeps a perplexity."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, Search, Uniform
from lit_prune.depth import Depth
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.families import find_blocks
from lit_prune.models.load import load_tokenizer
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct
from lit_prune.shrink import HeadGroups, MLPWidth
from lit_prune.target_perplexity import find_sparsity, greatest
from tests.conftest import lively_model, small_model

MASKS = Recipe(Magnitude(), allocation=Uniform())
TEXT = "Return the number of items in a container, or raise an error if the object has no length."


@pytest.fixture
def validation() -> tuple[list[dict[str, Tensor]], str]:
    ids = torch.tensor([load_tokenizer("embedded")(TEXT)["input_ids"]])
    return [{"input_ids": ids}], "text"


def test_greatest_by_hand() -> None:
    tried: list[float] = []

    def allows(number: float) -> bool:
        tried.append(number)
        return number <= 0.6

    assert greatest(allows, 0, 1, 0.2) == 0.5
    assert tried == [0.5, 0.75, 0.625]
    assert greatest(lambda number: False, 0, 1, 0.2) is None
    assert greatest(lambda number: True, 0, 1, 0.2) == 0.875


def test_numbers_that_cannot_be_tried_by_hand() -> None:
    tried: list[float] = []

    def allows(number: float) -> bool:
        tried.append(round(number, 9))
        return number <= 0.55

    def possible(number: float) -> bool:
        return not 0.45 < number < 0.75

    assert greatest(allows, 0, 1, 0.1, possible) == pytest.approx(0.4)
    assert tried == [0.4, 0.8]  # 0.5 and 0.6 cannot be tried, then 0.7 cannot, and last 0.6, 0.7 and 0.5
    assert greatest(lambda number: True, 0, 1, 0.1, lambda number: False) is None


def test_numbers_of_heads_that_the_config_does_not_accept_are_left_out(
    validation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 heads 1, 2 and 4 divide the 32 dimensions, and have a perplexity of 80, 40 and 20."""

    def measured(model: PreTrainedModel, *_: object, **__: object) -> Any:
        return SimpleNamespace(perplexity=80 / model.config.num_attention_heads)

    monkeypatch.setattr("lit_prune.target_perplexity.measure", measured)
    model = lively_model("llama", num_attention_heads=8, num_key_value_heads=8, vocab_size=4096)
    batches, recipe = [batch["input_ids"] for batch in validation[0]], Recipe(HeadGroups(), allocation=Uniform())
    found = find_sparsity(model, batches, recipe, validation, 25.0)
    assert {trial.perplexity for trial in found.trials} == {80, 40, 20}
    assert (found.perplexity, round(8 * found.sparsity)) == (20, 4)
    assert round(8 * found.next_greater.sparsity) == 6  # 5 and 3 heads are left out
    assert found.next_greater.perplexity == 40
    assert replace(recipe, sparsity=found.sparsity).fits(model)
    assert not replace(recipe, sparsity=3 / 8).fits(model)
    assert replace(recipe, sparsity=3 / 8, allocation=DLP()).fits(model)


@pytest.mark.parametrize(
    ("recipe", "sparsities"),
    [
        (MASKS, (0.0, 0.99)),
        (replace(MASKS, min_rate=0.1, max_rate=0.8), (0.1, 0.8)),
        (Recipe(MLPWidth(multiple=8), allocation=Uniform()), (0.0, 0.8333)),  # 40 of 48 channels
        # the 11,520 parameters of those, of 25,312
        (Recipe(MLPWidth(multiple=8), allocation=Uniform(), budget="parameters"), (0.0, 0.4551)),
        (Recipe(Depth(), allocation=Uniform()), (0.0, 0.6666)),  # two of three blocks
        (replace(MASKS, budget="parameters"), (0.0013, 0.9024)),  # (0.99 * 23,040 + 32 zeros of the padding) / 25,312
    ],
)
def test_the_sparsities_of_a_recipe(recipe: Recipe, sparsities: tuple[float, float]) -> None:
    assert recipe.sparsities(small_model()) == sparsities


def test_the_greatest_sparsity_is_found(embedded: PreTrainedModel, validation: Any) -> None:
    dense = measure(embedded, *validation).perplexity
    weights = embedded.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    found = find_sparsity(embedded, [], MASKS, validation, 2 * dense, tolerance=0.05)
    assert torch.equal(embedded.state_dict()["model.layers.0.mlp.up_proj.weight"], weights)
    assert (found.before, found.limit) == (dense, 2 * dense)
    assert [trial.sparsity for trial in found.trials[:2]] == [0.99, 0.495]
    assert len(found.trials) == 1 + 5  # 0.99 / 2^5 is below 0.05
    above = [trial for trial in found.trials if trial.sparsity > found.sparsity]
    assert all(trial.perplexity > 2 * dense for trial in above)
    assert min(trial.sparsity for trial in above) - found.sparsity <= 0.05
    prune(embedded, [], replace(MASKS, sparsity=found.sparsity))
    assert measure(embedded, *validation).perplexity == found.perplexity <= 2 * dense


def test_channels(embedded: PreTrainedModel, validation: Any, capsys: pytest.CaptureFixture[str]) -> None:
    dense = measure(embedded, *validation).perplexity
    recipe = Recipe(MLPWidth(compensate=False), allocation=Uniform())
    batches = [batch["input_ids"] for batch in validation[0]]
    found = find_sparsity(embedded, batches, recipe, validation, 1.5 * dense, tolerance=0.2)
    assert "Scoring blocks" not in capsys.readouterr().err  # equal rates, and statistics behind blocks that were cut
    prune(embedded, batches, replace(recipe, sparsity=found.sparsity))
    assert measure(embedded, *validation).perplexity == pytest.approx(found.perplexity, rel=1e-6)
    assert 0 < found.sparsity < 0.875


def test_blocks(embedded: PreTrainedModel, validation: Any, capsys: pytest.CaptureFixture[str]) -> None:
    batches = [batch["input_ids"] for batch in validation[0]]
    dense = measure(embedded, *validation).perplexity
    found = find_sparsity(embedded, batches, Recipe(Depth(), allocation=Uniform()), validation, 1.01 * dense)
    count = len(find_blocks(embedded))
    labels = capsys.readouterr().err
    counts = [round(trial.sparsity * count) for trial in found.trials]
    assert labels.count("of 8 blocks: ") == len(set(counts) - {0}) < len(counts)
    assert found.trials[0].sparsity == pytest.approx(1 - 1 / count, abs=1e-4)
    assert round(found.sparsity * count) == 0  # the sparsities below half a block remove none


def test_a_single_sparsity_is_refused_before_anything_is_measured(embedded: PreTrainedModel) -> None:
    single = replace(MASKS, min_rate=0.3, max_rate=0.3)
    with pytest.raises(InputError, match=r"`pruning.target_perplexity` must be left out if only the sparsity 0\.3 is"):
        find_sparsity(embedded, [], single, ([], ""), 100.0)


def test_what_cannot_be_reached(embedded: PreTrainedModel, validation: Any) -> None:
    with pytest.raises(InputError, match=r"must be at least \d+\.\d+, that of the model before the cut, got 1\.5"):
        find_sparsity(embedded, [], MASKS, validation, 1.5)
    few = replace(MASKS, max_rate=0.1)
    with pytest.raises(
        InputError, match=r"must be below .*, that of the largest sparsity that the recipe allows, 0\.1"
    ):
        find_sparsity(embedded, [], few, validation, 1e6)
    dense = measure(embedded, *validation).perplexity
    many = replace(MASKS, min_rate=0.9)
    with pytest.raises(
        InputError, match=r"must be at least .*, that of a sparsity of 0\.945, the smallest that was tr"
    ):
        find_sparsity(embedded, [], many, validation, dense * 1.01, tolerance=0.05)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            replace(MASKS, allocation=Search()),
            "`pruning.allocation` must not be Search with `pruning.target_perplexity`",
        ),
        (
            Recipe(MLPWidth(), allocation=Uniform(), budget="bytes"),
            "`pruning.budget` must be linears or parameters with",
        ),
        (replace(MASKS, reconstruction=Reconstruct(state="x")), "`pruning.reconstruction.state` must be null with"),
    ],
)
def test_settings_with_which_a_cut_cannot_be_tried_often(recipe: Recipe, message: str, validation: Any) -> None:
    with pytest.raises(InputError, match=message):
        find_sparsity(small_model(), [], recipe, validation, 100.0)
