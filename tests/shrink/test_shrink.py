"""Several parts shrunk under one budget.

A block of the Llama here has 4 key/value groups with one head of 8 each, 8 * 32 weights in q, k, v and o, 4,096 in all,
and 48 channels with 3 * 32, 4,608 in all.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.allocate import LayerRedundancy, Plan, Search, Uniform
from lit_prune.allocate.base import weighted_mean
from lit_prune.allocate.plan import write_plan
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.depth import Depth
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.experts import Experts
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.pruning import Method, Wanda
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct
from lit_prune.search.trial import Trial
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from lit_prune.shrink.units.sizes import rates_from_units
from tests.calibration.plain_forward import hidden_by_block
from tests.conftest import lively_model, small_model
from tests.experts.models import mixture_model
from tests.shrink.given import Given
from tests.shrink.test_base import dense_statistics, four_groups

BOTH = Shrink([MLPWidth(multiple=8), HeadGroups()])
FINE = Shrink([MLPWidth(multiple=1), HeadGroups()])


def test_every_part_loses_its_share(batches: list[Tensor], tmp_path: Path) -> None:
    model = four_groups()
    dense, kind = parameters(model), type(model)
    pruned = prune(model, batches, Recipe(BOTH, 0.5, Uniform()))
    assert pruned.sizes == [4_096 + 4_608] * 3
    assert pruned.achieved == [0.5] * 3
    assert dense - parameters(model) == 3 * (4_096 + 4_608) / 2
    names = [type(found).__name__ for found in structure.structures(model)]
    assert names == ["MLPWidths", "HeadGroupCounts"]
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is kind
    assert (opened.config.intermediate_size, opened.config.num_key_value_heads) == (24, 2)
    assert torch.equal(opened(batches[0]).logits, model(batches[0]).logits)
    assert [file.name for file in tmp_path.glob("*.py")] == []


def test_blocks_of_different_sizes(batches: list[Tensor], tmp_path: Path) -> None:
    model = four_groups()
    prune(model, batches, Recipe(BOTH, 0.5, Given((0.25, 0.5, 0.75))))
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.config.block_sizes["num_key_value_heads"] == [3, 2, 1]
    widths = opened.config.block_sizes["intermediate_size"]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) > 1
    assert torch.equal(opened(batches[0]).logits, model(batches[0]).logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert opened.generate(batches[0], **settings).tolist() == model.generate(batches[0], **settings).tolist()  # type: ignore[operator]


@pytest.mark.parametrize("fields", [{"sparsity": 0.3, "budget": "parameters"}, {"target_parameters": 20_000}], ids=str)
@pytest.mark.parametrize("allocation", [Uniform(), LayerRedundancy(base=0.1)], ids=str)
def test_the_budget_is_met_to_half_a_channel(fields: dict[str, Any], allocation: Any, batches: list[Tensor]) -> None:
    model = four_groups("mistral")
    dense = parameters(model)
    prune(model, batches, Recipe(FINE, allocation=allocation, **fields))
    target = fields.get("target_parameters", 0.7 * dense)
    assert abs(parameters(model) - target) <= 3 * 96 / 2


def test_the_attention_is_cut_before_the_mlp_whatever_the_order_of_the_parts(batches: list[Tensor]) -> None:
    model, turned, alone = four_groups(), four_groups(), four_groups()
    prune(model, batches, Recipe(BOTH, 0.5, Uniform()))
    prune(turned, batches, Recipe(Shrink(BOTH.parts[::-1]), 0.5, Uniform()))  # type: ignore[index]
    for one, other in zip(model.state_dict().values(), turned.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [type(found).__name__ for found in structure.structures(turned)] == ["HeadGroupCounts", "MLPWidths"]
    prune(alone, batches, Recipe(HeadGroups(), 0.5, Uniform()))
    first, expected = model.model.layers[0], alone.model.layers[0]
    assert torch.equal(first.self_attn.o_proj.weight, expected.self_attn.o_proj.weight)
    assert not torch.equal(model.model.layers[1].self_attn.o_proj.weight, alone.model.layers[1].self_attn.o_proj.weight)


def many_tokens() -> list[Tensor]:
    return list(torch.randint(1, 64, (8, 4, 64), generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def test_the_mlp_makes_up_for_the_attention_of_its_block() -> None:
    batches = many_tokens()
    dense, plain, model = (four_groups() for _ in range(3))
    for shrunk, correct_errors in ((plain, False), (model, True)):
        parts = [MLPWidth(multiple=1, correct_errors=correct_errors), HeadGroups()]
        prune(shrunk, batches, Recipe(Shrink(parts), 0.25, Given((0.75, 0, 0))))
    errors = [0.0, 0.0]
    for batch in batches:
        target_BTD, *outputs = (hidden_by_block(each, {"input_ids": batch})[1][0] for each in (dense, plain, model))
        for index, y_BTD in enumerate(outputs):
            errors[index] += float((y_BTD - target_BTD).square().sum())
    assert errors[1] < 0.98 * errors[0], errors


def test_all_parts_are_reconstructed_at_once(tmp_path: Path) -> None:
    model, cut, batches = four_groups(), four_groups(), many_tokens()
    recipe = Recipe(BOTH, 0.5, Given((0.25, 0.5, 0.75)), reconstruction=Reconstruct(state=str(tmp_path / "state")))
    pruned = prune(model, batches, recipe)
    assert len(pruned.reconstruction) == 3
    assert all(block.kept and block.held_out_after < block.held_out_before for block in pruned.reconstruction)
    prune(cut, batches, replace(recipe, reconstruction=None))
    assert [tensor.shape for tensor in model.state_dict().values()] == [t.shape for t in cut.state_dict().values()]
    first, plain = (each.model.layers[0] for each in (model, cut))
    assert not torch.equal(first.self_attn.q_proj.weight, plain.self_attn.q_proj.weight)
    assert not torch.equal(first.mlp.up_proj.weight, plain.mlp.up_proj.weight)
    again = four_groups()
    prune(again, batches, recipe)  # from the state
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_second_cut_and_masks_on_top(batches: list[Tensor]) -> None:
    model = four_groups("mistral")
    prune(model, batches, Recipe(FINE, 0.25, Uniform()))
    pruned = prune(model, batches, Recipe(FINE, 0.5, Uniform()))
    assert pruned.sparsity_before == pytest.approx(0.25)
    assert pruned.sparsity == pytest.approx(0.5)
    assert prune(model, batches, Recipe(Wanda(), 0.5, Uniform())).sparsity == pytest.approx(0.5, abs=1e-2)


def test_weights(batches: list[Tensor]) -> None:
    """4 t of 4,096 and t of 4,608 parameters are 0.3 * 8,704, t = 0.124: 2 groups; 563 are left, 6 channels of 96."""
    model = four_groups()
    prune(model, batches, Recipe(Shrink(FINE.parts, weights=[1, 4]), 0.3, Uniform()))
    widths, groups = structure.structures(model)
    assert groups.units == [2] * 3  # type: ignore[attr-defined]
    assert widths.units == [42] * 3  # type: ignore[attr-defined]


def test_a_search_of_all_parts(batches: list[Tensor]) -> None:
    search = Search(evaluations=20, windows=1, step=0.25)
    model, before = four_groups(), four_groups()
    pruned = prune(model, batches, Recipe(FINE, 0.5, search))
    assert pruned.search["loss_end"] <= pruned.search["loss_start"]
    assert parameters(before) - parameters(model) == pytest.approx(3 * (4_096 + 4_608) / 2, abs=3 * 96)


def test_a_trial_swaps_the_weights_of_all_parts(batches: list[Tensor]) -> None:
    model, dicts = four_groups(), [{"input_ids": batch} for batch in batches]
    dense = model(batches[0]).logits
    arguments: dict[str, Any] = {"statistics": dense_statistics(model, batches), "device": torch.device("cpu")}
    with BOTH.trial(model, find_blocks(model), **arguments, batches=dicts) as trial, torch.no_grad():
        trial.take([0.5, 0.0, 0.0])
        tried = model(batches[0]).logits
        zeros = [float((layer.mlp.down_proj.weight == 0).float().mean()) for layer in model.model.layers]
        groups = [float((layer.self_attn.o_proj.weight == 0).float().mean()) for layer in model.model.layers]
        trial.take_unpruned()
        unpruned = model(batches[0]).logits
        trial.by_name().take([0.5] * 6)
        trial.by_name().take_unpruned()
        assert torch.equal(model(batches[0]).logits, unpruned)
        assert torch.equal(unpruned, dense)
    assert (zeros, groups) == (pytest.approx([0.5, 0, 0]), pytest.approx([0.5, 0, 0]))
    assert not torch.equal(tried, dense)
    assert torch.equal(model(batches[0]).logits, dense)


def test_a_trial_at_the_start_is_the_cut(batches: list[Tensor]) -> None:
    model, cut, dicts = four_groups(), four_groups(), [{"input_ids": batch} for batch in batches]
    blocks, device, rates = find_blocks(model), torch.device("cpu"), [0.5, 0.5, 0.5]
    arguments: dict[str, Any] = {"device": device, "stream": lambda: Stream(model, blocks, dicts, device)}
    empty = [BlockStatistics() for _ in blocks]
    statistics = BOTH.trial_statistics(model, blocks, rates=rates, statistics=empty, **arguments)
    assert torch.equal(model(batches[0]).logits, four_groups()(batches[0]).logits)
    with BOTH.trial(model, blocks, statistics=statistics, device=device, batches=dicts) as trial, torch.no_grad():
        trial.take(rates)
        tried = model(batches[0]).logits
    prune(cut, batches, Recipe(BOTH, 0.5, Uniform()))
    torch.testing.assert_close(tried, cut(batches[0]).logits.detach(), rtol=1e-3, atol=1e-4)


def test_a_block_without_any_of_the_parts(batches: list[Tensor]) -> None:
    """The middle block of this model is not a mixture."""
    model = mixture_model("qwen3_moe")
    pruned = prune(model, batches, Recipe(Shrink([Experts()]), 1 / 3, Uniform()))
    assert pruned.achieved == pytest.approx([1 / 3, 0, 1 / 3])
    assert model.config.num_experts == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"`Shrink.parts` must be a list of methods, such as \[MLPWidth, HeadGroups\], got none"),
        ({"parts": []}, "`Shrink.parts` must be a list of methods"),
        ({"parts": [MLPWidth]}, r"`Shrink.parts` must be objects such as MLPWidth\(\), got the class MLPWidth"),
        ({"parts": ["MLPWidth"]}, "`Shrink.parts` must be objects .* got 'MLPWidth'"),
        ({"parts": [Wanda()]}, "`Shrink.parts` must be methods that make a model smaller: .* got Wanda"),
        ({"parts": [BOTH]}, "`Shrink.parts` must be methods that make a model smaller: .* got Shrink"),
        ({"parts": [MLPWidth(), MLPWidth()]}, "`Shrink.parts` must be different methods, got MLPWidth, MLPWidth"),
        ({"parts": [MLPWidth()], "weights": [1, 2]}, r"`Shrink.weights` must be 1 positive numbers, .* got \[1, 2\]"),
        ({"parts": [MLPWidth()], "weights": [0]}, r"`Shrink.weights` must be 1 positive numbers, .* got \[0\]"),
    ],
)
def test_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Shrink(**given)


@pytest.mark.parametrize(
    ("recipe", "family", "message"),
    [
        (Recipe(BOTH, 0.9, Uniform()), "llama", "`pruning.sparsity` must be at most 0.7"),
        (Recipe(BOTH, 0.3, Uniform()), "gpt2", "HeadGroups cannot shrink the family 'gpt2'"),
        (Recipe(BOTH, 0.3, LayerRedundancy()), "falcon", "MLPWidth and the family 'falcon'|HeadGroups cannot shrink"),
        (
            Recipe(BOTH, allocation=Uniform(), target_parameters=9),
            "llama",
            "must be between .* allow for the parts of S",
        ),
    ],
)
def test_what_is_refused(recipe: Recipe, family: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.check(small_model(family))


def test_a_family_with_biases(batches: list[Tensor]) -> None:
    model = lively_model("phi", num_key_value_heads=4)
    dense = parameters(model)
    prune(model, batches, Recipe(FINE, 0.3, Uniform(), budget="parameters"))
    assert parameters(model) / dense == pytest.approx(0.7, abs=0.005)


PARTS = Search(Uniform(), evaluations=120, level="parts", loss="kl")


def rates_of(model: PreTrainedModel) -> list[dict[str, float]]:
    structures: list[Any] = structure.structures(model)
    widths, groups = (rates_from_units(found.units, found.full) for found in structures)
    return [{"MLPWidth": width, "HeadGroups": group} for width, group in zip(widths, groups, strict=True)]


def without_attention() -> PreTrainedModel:
    model = four_groups()
    for block in find_blocks(model):
        block.linears["self_attn.o_proj"].write(torch.zeros(32, 32))
    return model


def test_a_search_finds_how_much_each_part_loses(
    batches: list[Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attention writes nothing here, so that groups are free, and channels are not."""
    model, state = without_attention(), tmp_path / "state.json"
    search, dense = replace(PARTS, state=str(state)), parameters(model)
    pruned = prune(model, batches, Recipe(FINE, 0.3, search, budget="parameters"))
    assert abs(parameters(model) - 0.7 * dense) <= 96  # one channel of one block
    assert pruned.parts is not None
    assert pruned.parts == [pytest.approx(rates) for rates in rates_of(model)]
    lost = {name: sum(rates[name] for rates in pruned.parts) / 3 for name in ("MLPWidth", "HeadGroups")}
    assert lost["HeadGroups"] >= 0.5 > lost["MLPWidth"] + 0.2
    assert pruned.search["start"] == "HeadGroups first"
    means = [(4_608 * rates["MLPWidth"] + 4_096 * rates["HeadGroups"]) / 8_704 for rates in pruned.parts]
    assert pruned.rates == pytest.approx(means)
    before = state.read_text()
    capsys.readouterr()
    again = prune(without_attention(), batches, Recipe(FINE, 0.3, search, budget="parameters"))
    assert (again.parts, state.read_text()) == (pruned.parts, before)  # nothing is measured again
    assert "Observing pruned blocks" not in capsys.readouterr().err.partition("The search starts from ")[0]


def test_a_search_of_parts_starts_from_the_best_of_several_mixtures(
    batches: list[Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state.json"
    search = replace(PARTS, evaluations=26, state=str(state))
    pruned = prune(without_attention(), batches, Recipe(FINE, 0.3, search))
    losses = json.loads(state.read_text())["mixtures"]
    assert list(losses) == ["equal shares", "HeadGroups first", "MLPWidth first"]
    assert losses["HeadGroups first"] == min(losses.values()) == pruned.search["loss_start"]
    assert losses["HeadGroups first"] < 0.1 * losses["equal shares"]
    assert losses["equal shares"] < losses["MLPWidth first"]
    assert "The search starts from HeadGroups first: loss " in capsys.readouterr().err


def test_a_search_of_parts_with_weights_starts_from_these(batches: list[Tensor], tmp_path: Path) -> None:
    search = replace(PARTS, evaluations=26, state=str(tmp_path / "state.json"))
    weighted = Shrink([MLPWidth(multiple=1), HeadGroups()], [1.0, 1.0])
    pruned = prune(without_attention(), batches, Recipe(weighted, 0.3, search))
    assert "start" not in pruned.search
    assert "mixtures" not in json.loads((tmp_path / "state.json").read_text())


@pytest.mark.parametrize(
    ("before", "sparsity", "bounds"),
    [
        (None, 0.85, {}),
        (None, 0.6, {"max_rate": 0.6}),
        (HeadGroups(), 0.4, {"min_rate": 0.3}),
        (MLPWidth(multiple=1), 0.5, {"min_rate": 0.3}),
    ],
)
def test_no_mixture_misses_the_budget(
    before: Method | None, sparsity: float, bounds: dict[str, float], batches: list[Tensor]
) -> None:
    model = four_groups()
    if before is not None:
        prune(model, batches, Recipe(before, 0.75 if isinstance(before, HeadGroups) else 0.5, Uniform()))
    search = replace(PARTS, evaluations=26, loss="cross_entropy")
    pruned = prune(model, batches, Recipe(FINE, sparsity, search, **bounds))  # type: ignore[arg-type]
    assert pruned.sparsity == pytest.approx(sparsity, abs=2e-3)


def test_what_a_stopped_comparison_of_mixtures_measured_is_kept(
    batches: list[Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[Any] = []
    observe = Shrink.trial_statistics

    def stopped(*args: Any, **kwargs: Any) -> Any:
        observed.append(kwargs)
        if len(observed) == 2:
            raise KeyboardInterrupt
        return observe(*args, **kwargs)

    monkeypatch.setattr(Shrink, "trial_statistics", stopped)
    recipe = Recipe(FINE, 0.3, replace(PARTS, evaluations=26, state=str(tmp_path / "state.json")))
    with pytest.raises(KeyboardInterrupt):
        prune(four_groups(), batches, recipe)
    assert "Search stopped before its first sweep; its measurements are in" in capsys.readouterr().err
    found = prune(four_groups(), batches, recipe)
    assert len(observed) == 2 + 3  # the two other mixtures, and again the first, which is the best
    assert found.search["start"] == "equal shares"
    fresh = prune(four_groups(), batches, replace(recipe, allocation=replace(PARTS, evaluations=26)))
    assert (fresh.parts, fresh.search) == (found.parts, found.search)


def test_mixtures_without_a_loss(batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "divergence", lambda *_: math.inf)
    with pytest.raises(InputError, match="the loss under the rates of `Search.start` is NaN or infinity"):
        prune(four_groups(), batches, Recipe(FINE, 0.3, PARTS))


def test_a_state_of_a_search_that_knew_one_start_alone_is_refused_at_once(
    batches: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = replace(PARTS, evaluations=26, state=str(tmp_path / "state.json"))
    recipe = Recipe(FINE, 0.3, search)
    prune(four_groups(), batches, recipe)
    old = json.loads((tmp_path / "state.json").read_text())
    del old["mixtures"], old["key"]["mixtures"]
    (tmp_path / "state.json").write_text(json.dumps(old))
    monkeypatch.setattr("lit_prune.pipeline.Stream", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match="`mixtures` None, now equal shares, or a part first"):
        prune(four_groups(), batches, recipe)


def test_a_plan_has_the_rates_of_the_parts(batches: list[Tensor], tmp_path: Path) -> None:
    model, planned, path = four_groups(), four_groups(), tmp_path / "plan.yaml"
    pruned = prune(model, batches, Recipe(FINE, 0.5, PARTS))
    write_plan(path, pruned.rates, pruned.scores, "", pruned.parts)
    mean = f"{weighted_mean(pruned.rates, pruned.sizes):.6g}"
    assert prune(planned, batches, Recipe(FINE, float(mean), Plan(str(path)))).parts is not None
    assert rates_of(planned) == rates_of(model)
    path.write_text("0: {rate: 0.5, MLPWidth: 0.1, HeadGroups: 0.95}\n1: 0.5\n2: 0.5\n")
    with pytest.raises(InputError, match=r"the rate of HeadGroups of block 0 must be between 0, .* and 0.75, .* 0.95"):
        Recipe(FINE, 0.5, Plan(str(path))).check(four_groups())


@pytest.mark.parametrize("left", [19_000, 21_500])
def test_a_search_of_parts_meets_the_budget_to_half_a_multiple(left: int, batches: list[Tensor]) -> None:
    """Equal widths alone would be off by up to 4 channels of 96 parameters in each of the 3 blocks."""
    model = four_groups()
    search = replace(PARTS, evaluations=20, windows=1)
    prune(model, batches, Recipe(BOTH, allocation=search, target_parameters=left))
    assert abs(parameters(model) - left) <= 8 * 96 / 2


def test_a_plan_of_parts_that_was_made_for_a_target_meets_it(batches: list[Tensor], tmp_path: Path) -> None:
    searched, planned, path = four_groups(), four_groups(), tmp_path / "plan.yaml"
    asked = Recipe(BOTH, allocation=replace(PARTS, evaluations=20, windows=1), target_parameters=21_500)
    pruned = prune(searched, batches, asked)
    write_plan(path, pruned.rates, pruned.scores, "", pruned.parts)
    assert abs(weighted_mean(pruned.rates, pruned.sizes) - pruned.target) > 1e-3
    again = prune(planned, batches, replace(asked, allocation=Plan(str(path))))
    assert rates_of(planned) == rates_of(searched)
    assert again.rates == pytest.approx(pruned.rates, abs=1e-5)
    with pytest.raises(InputError, match="`Plan.path`: the mean of the rates in .*, without a `pruning.target_par"):
        replace(asked, allocation=Plan(str(path)), target_parameters=21_000).check(four_groups())


def test_bounds_hold_for_every_part(batches: list[Tensor]) -> None:
    model = without_attention()
    pruned = prune(model, batches, Recipe(FINE, 0.5, PARTS, min_rate=0.25, max_rate=0.6))
    assert len({rate for rates in pruned.parts or () for rate in rates.values()}) > 2
    assert all(0.25 <= rate <= 0.6 + 1e-9 for rates in rates_of(model) for rate in rates.values())


def test_a_second_cut_by_a_search_of_parts(batches: list[Tensor]) -> None:
    model = four_groups("mistral")
    prune(model, batches, Recipe(FINE, 0.25, Uniform()))
    pruned = prune(model, batches, Recipe(FINE, 0.5, PARTS))
    assert pruned.sparsity == pytest.approx(0.5, abs=96 / 8_704 / 3)
    assert all(rate >= 0.25 - 1e-9 for rates in rates_of(model) for rate in rates.values())


def test_what_one_part_lost_before_does_not_bound_the_other(batches: list[Tensor]) -> None:
    """Channels that write nothing go alone, although a block has lost more than its groups have."""
    model = four_groups()
    prune(model, batches, Recipe(MLPWidth(multiple=1), 0.5, Uniform()))
    for block in find_blocks(model):
        block.linears["mlp.down_proj"].write(torch.zeros(32, 24))
    pruned = prune(model, batches, Recipe(FINE, 0.4, PARTS))
    assert pruned.search["start"] == "MLPWidth first"
    assert [rates["HeadGroups"] for rates in rates_of(model)] == [0.0] * 3


@pytest.mark.parametrize(
    ("method", "level", "message"),
    [
        (BOTH, "linears", "must have rates of blocks or parts for Shrink, got rates of linears: .* for Shrink"),
        (Wanda(), "parts", "must have rates of blocks or linears for Wanda, got rates of parts: .* for masks"),
        (MLPWidth(), "parts", "must have one rate per block for MLPWidth, got rates of parts"),
    ],
    ids=str,
)
def test_levels_that_a_method_does_not_have(method: Method, level: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"`pruning.allocation` {message}"):
        Recipe(method, 0.3, Search(level=level))


@pytest.mark.parametrize(
    ("sparsity", "parts", "told"),
    [
        (0.1, [MLPWidth(multiple=1), HeadGroups()], ["HeadGroups"]),
        (0.5, [MLPWidth(multiple=1), HeadGroups()], []),
        (0.1, [MLPWidth(multiple=1), Depth()], ["Depth"]),
    ],
)
def test_a_part_that_loses_nothing_is_named(
    sparsity: float, parts: list[Method], told: list[str], batches: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    prune(small_model(), batches, Recipe(Shrink(parts), sparsity, Uniform()))
    assert re.findall(r"(\w+) removes nothing: its share is less", capsys.readouterr().err) == told


def test_a_part_that_has_nothing_left_to_lose_is_not_named(
    batches: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model()
    prune(model, batches, Recipe(HeadGroups(), 0.5))
    prune(model, batches, Recipe(Shrink([HeadGroups(), MLPWidth(multiple=8)]), 0.6))
    assert "removes nothing" not in capsys.readouterr().err
