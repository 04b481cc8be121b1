"""Cuts of the whole model and of the parts of its blocks under one budget.

The model has six blocks, a stream of 32 dimensions and MLPs of 48 channels with 3 * 32 weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.allocate import DLP, LayerRedundancy, Plan, Search, Uniform
from lit_prune.allocate.base import weighted_mean
from lit_prune.allocate.plan import write_plan
from lit_prune.depth import Depth
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.experts import Experts
from lit_prune.hidden import HiddenWidth
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.models.load import load_model
from lit_prune.pipeline import prune
from lit_prune.pruning import Wanda
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from lit_prune.shrink.stages import Counts
from tests.conftest import lively_model, small_model
from tests.experts.models import mixture_model

SIX = {"num_hidden_layers": 6}
CHANNELS, WIDTH = MLPWidth(multiple=1), HiddenWidth(multiple=4)
ALL = [CHANNELS, WIDTH, HeadGroups(), Depth()]


def six_blocks(family: str = "llama") -> PreTrainedModel:
    return lively_model(family, **SIX)


def sizes(model: PreTrainedModel) -> tuple[int, int, int]:
    config: Any = model.config
    return config.num_hidden_layers, config.hidden_size, config.intermediate_size


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("target", [0.25, 0.4, 0.55])
def test_the_target_is_met_to_half_a_channel(family: str, target: float, batches: list[Tensor], tmp_path: Path) -> None:
    model = six_blocks(family)
    dense, kind = parameters(model), type(model)
    wanted = round((1 - target) * dense)
    pruned = prune(model, batches, Recipe(Shrink([CHANNELS, WIDTH, Depth()]), target_parameters=wanted))
    blocks, width, channels = sizes(model)
    assert blocks < 6
    assert width < 32 or target == 0.25
    assert channels < 48
    assert abs(parameters(model) - wanted) <= blocks * 3 * width / 2
    assert pruned.sparsity == pytest.approx(1 - parameters(model) / dense)
    assert sum(pruned.sizes) == dense
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is kind
    assert torch.equal(opened(batches[0]).logits, model(batches[0]).logits)


def test_all_parts_lose_the_same_share_or_by_weights(batches: list[Tensor]) -> None:
    model = six_blocks()
    prune(model, batches, Recipe(Shrink(ALL), 0.55))
    blocks, width, channels = sizes(model)
    shares = [1 - blocks / 6, 1 - width / 32, 1 - channels / 48]
    assert max(shares) - min(shares) < 0.1, shares
    names = [type(found).__name__ for found in structure.structures(model)]
    assert names == ["RemainingBlocks", "HiddenSize", "MLPWidths", "HeadGroupCounts"]
    unequal = six_blocks()
    prune(unequal, batches, Recipe(Shrink([CHANNELS, Depth()], weights=[1, 0.1]), 0.3))
    assert sizes(unequal)[0] == 6
    few = six_blocks()
    prune(few, batches, Recipe(Shrink([CHANNELS, Depth()], weights=[0.2, 1]), 0.35))
    assert sizes(few)[0] == 4
    assert sizes(few)[2] > sizes(unequal)[2]


def test_the_blocks_that_go_are_those_of_depth_alone(batches: list[Tensor]) -> None:
    model, short = six_blocks(), six_blocks()
    pruned = prune(model, batches, Recipe(Shrink([CHANNELS, Depth()]), 0.4))
    gone = [block for block, share in enumerate(pruned.achieved) if share > 0.9]
    prune(short, batches, Recipe(Depth(), len(gone) / 6, Uniform()))
    expected = structure.structures(short)[0]
    assert structure.structures(model)[0] == expected
    assert len(gone) == 2


@torch.no_grad()
def test_units_are_cut_by_what_the_cuts_before_have_left(batches: list[Tensor]) -> None:
    model, by_hand = six_blocks(), six_blocks()
    prune(model, batches, Recipe(Shrink([Depth(), CHANNELS]), 0.4))
    blocks, _, channels = sizes(model)
    prune(by_hand, batches, Recipe(Depth(), 1 - blocks / 6, Uniform()))
    prune(by_hand, batches, Recipe(CHANNELS, 1 - channels / 48, Uniform()))
    assert torch.equal(by_hand(batches[0]).logits, model(batches[0]).logits)


def test_blocks_of_different_sizes(batches: list[Tensor]) -> None:
    model, dense = six_blocks(), parameters(six_blocks())
    allocation = LayerRedundancy(base=0.1)
    pruned = prune(model, batches, Recipe(Shrink([Depth(), CHANNELS]), 0.4, allocation))
    kept = [block for block, share in enumerate(pruned.achieved) if share < 0.9]
    rates = [pruned.rates[block] for block in kept]
    assert max(rates) <= min(rate for block, rate in enumerate(pruned.rates) if block not in kept)
    widths = model.config.block_sizes["intermediate_size"]
    assert len(widths) == len(kept) < 6
    assert [widths[rates.index(rate)] for rate in sorted(rates)] == sorted(widths, reverse=True)
    assert parameters(model) == pytest.approx(0.6 * dense, abs=3 * 32 * len(kept) / 2)


def test_a_plan(batches: list[Tensor], tmp_path: Path) -> None:
    rates = [0.1, 0.2, 0.8, 0.2, 0.6, 0.5]
    write_plan(tmp_path / "plan.yaml", rates, rates, "by hand")
    model = six_blocks()
    pruned = prune(model, batches, Recipe(Shrink([Depth(), CHANNELS]), 0.4, Plan(str(tmp_path / "plan.yaml"))))
    assert pruned.achieved[2] > 0.9
    widths = model.config.block_sizes["intermediate_size"]
    assert widths[0] > widths[1] == widths[2] > widths[3]
    assert len(widths) == 4


@pytest.mark.parametrize("parts", [[Depth(), WIDTH], [Depth()], [WIDTH]], ids=len)
def test_without_parts_of_the_blocks_the_last_cut_is_rounded_to_the_nearest(
    parts: list[Any], batches: list[Tensor]
) -> None:
    model, dense = six_blocks(), parameters(six_blocks())
    prune(model, batches, Recipe(Shrink(parts), 0.4))
    step = parameters(find_blocks(model)[0].module) if parts == [Depth()] else 4 * dense / 32
    assert abs(parameters(model) - 0.6 * dense) <= 0.51 * step


@pytest.mark.parametrize(
    ("weights", "sparsity", "blocks"),
    [
        ([1, 0.01], 0.25, 5),  # 1.6 blocks are wanted, and two are more than is asked for
        ([1, 0.01], 0.46, 4),
        ([0.1, 1], 0.65, 4),  # 0.4 blocks are wanted, and without one all channels together would be too few
        ([1, 1], 0.02, 6),
    ],
)
def test_blocks_are_rounded_so_that_channels_can_make_up_for_them(
    weights: list[float], sparsity: float, blocks: int, batches: list[Tensor]
) -> None:
    model, dense = six_blocks(), parameters(six_blocks())
    prune(model, batches, Recipe(Shrink([Depth(), CHANNELS], weights), sparsity))
    assert sizes(model)[0] == blocks
    assert abs(parameters(model) - (1 - sparsity) * dense) <= blocks * 3 * 32 / 2


def test_blocks_of_different_sizes_are_counted_as_they_are(batches: list[Tensor], tmp_path: Path) -> None:
    """Without block 1, which is the first to go, and twice as large as others, more would be gone than is asked for."""
    model, path = six_blocks(), tmp_path / "plan.yaml"
    uneven = [0.9, 0.1, 0.9, 0.9, 0.9, 0.9]
    write_plan(path, uneven, uneven, "by hand")
    prune(model, batches, Recipe(CHANNELS, sum(uneven) / 6, Plan(str(path))))
    method, before = Shrink([Depth(), CHANNELS], [1, 0.01]), parameters(model)
    rates, block_sizes = [0.1, 0.5, 0.1, 0.1, 0.1, 0.1], method.sizes(model, find_blocks(model))
    write_plan(path, rates, rates, "by hand")
    sparsity = round(weighted_mean(rates, block_sizes), 6)
    prune(model, batches, Recipe(method, sparsity, Plan(str(path))))
    assert sizes(model)[0] == 6
    assert parameters(model) == pytest.approx((1 - sparsity) * before, abs=6 * 3 * 32)


def test_steps_count_from_the_dense_model(batches: list[Tensor]) -> None:
    """A model that has lost half of its blocks loses single ones, as a model of so many blocks does."""
    method = Shrink([Depth(), CHANNELS], [1, 0.01])
    twelve = lively_model("llama", num_hidden_layers=12)
    prune(twelve, batches, Recipe(Depth(), 0.5, Uniform()))
    for model in (six_blocks(), twelve):
        prune(model, batches, Recipe(method, 0.25))
        assert sizes(model)[0] == 5


def test_a_width_below_the_multiple_of_today_stays(batches: list[Tensor]) -> None:
    model = six_blocks()
    prune(model, batches, Recipe(WIDTH, 0.75, Uniform()))
    before, wider = parameters(model), HiddenWidth(multiple=16)
    method, without = Shrink([Depth(), wider, CHANNELS]), Shrink([Depth(), CHANNELS])
    blocks = find_blocks(model)
    assert method.max_sparsity(model, blocks) == pytest.approx(without.max_sparsity(model, blocks))
    prune(model, batches, Recipe(method, 0.4))
    assert sizes(model)[1] == 8
    assert parameters(model) == pytest.approx(0.6 * before, abs=6 * 3 * 8 / 2)


def test_units_that_an_earlier_cut_has_left_lose_the_same_share(batches: list[Tensor], tmp_path: Path) -> None:
    model, path = six_blocks(), tmp_path / "plan.yaml"
    earlier = [0.0, 0.5, 0.0, 0.5, 0.0, 0.5]
    write_plan(path, earlier, earlier, "by hand")
    prune(model, batches, Recipe(CHANNELS, 0.25, Plan(str(path))))
    prune(model, batches, Recipe(Shrink([WIDTH, CHANNELS], [0.01, 1]), 0.2))
    widths = model.config.block_sizes["intermediate_size"]
    assert widths[0] < 48
    assert [widths[block] / 24 for block in (1, 3, 5)] == pytest.approx([widths[0] / 48] * 3, abs=0.03)


def test_mixtures_that_went_with_their_blocks(batches: list[Tensor]) -> None:
    """Block 0 alone has experts, and it is among those that go."""
    fields = {"num_hidden_layers": 4, "mlp_only_layers": [1, 2, 3]}
    short = mixture_model("qwen3_moe", **fields)
    pruned = prune(short, batches, Recipe(Depth(), 0.5, Uniform()))
    method = Shrink([Depth(), Experts()], [1, 0.1])
    model = mixture_model("qwen3_moe", **fields)
    asked = 1 - (parameters(short) + 1) / parameters(model)
    again = prune(model, batches, Recipe(method, asked))
    assert [share > 0.7 for share in again.achieved] == [share == 1 for share in pruned.achieved]
    assert Experts().max_rate(model, find_blocks(model)) == 0.0  # there is no mixture left


def test_a_shrunk_model_is_cut_again(batches: list[Tensor], tmp_path: Path) -> None:
    model = six_blocks()
    for sparsity in (0.3, 0.2):
        before = parameters(model)
        pruned = prune(model, batches, Recipe(Shrink([Depth(), CHANNELS, WIDTH]), sparsity))
        assert parameters(model) == pytest.approx((1 - sparsity) * before, abs=6 * 3 * 32 / 2)
        assert pruned.sparsity_before == 0
    model.save_pretrained(tmp_path)
    opened = load_model(str(tmp_path), "float32")
    assert torch.equal(opened(batches[0]).logits, model(batches[0]).logits)
    assert len(structure.structures(opened)) == 3
    assert prune(opened, batches, Recipe(Wanda(), 0.5, Uniform())).sparsity == pytest.approx(0.5, abs=1e-2)


def test_the_largest_sparsity_leaves_one_of_everything(batches: list[Tensor]) -> None:
    model = six_blocks()
    method = Shrink([Depth(), CHANNELS])
    prune(model, batches, Recipe(method, method.max_sparsity(model, find_blocks(model)) - 1e-4))
    assert sizes(model)[::2] == (1, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 0.3, "allocation": DLP()}, "`pruning.allocation` must be Uniform, LayerRedundancy or Plan"),
        ({"sparsity": 0.99}, "`pruning.sparsity` must be at most 0.8.* and Depth one block"),
        ({"target_parameters": 10}, "`pruning.target_parameters` must be between .* parts of Shrink"),
        ({"target_parameters": 53_000}, "`pruning.target_parameters` must be between .* parts of Shrink"),
        ({"sparsity": 0.3, "min_rate": 0.1}, "`pruning.min_rate` must be 0 and .* for Shrink with Depth or HiddenWid"),
        ({"sparsity": 0.3, "max_rate": 0.4}, "`pruning.min_rate` must be 0 and .* for Shrink with Depth or HiddenWid"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(Shrink([Depth(), CHANNELS]), **fields).check(lively_model("llama", **SIX))


def test_what_the_settings_do_not_allow() -> None:
    parts = [Depth(), CHANNELS]
    with pytest.raises(
        InputError, match=r"`pruning.reconstruction` must be null for Shrink with Depth or .* with these"
    ):
        Recipe(Shrink(parts), reconstruction=Reconstruct())
    with pytest.raises(InputError, match="`pruning.allocation` must not be Search for Shrink with Depth or Hid"):
        Recipe(Shrink(parts), allocation=Search())
    assert not Shrink(parts).repeats()
    with pytest.raises(InputError, match="HiddenWidth cannot shrink the family 'gpt2'"):
        Recipe(Shrink([WIDTH, CHANNELS]), 0.3).check(small_model("gpt2"))
    with pytest.raises(InputError, match="`pruning.allocation` must be Uniform for HiddenWidth"):
        Recipe(Shrink([WIDTH, CHANNELS]), 0.3, LayerRedundancy()).check(six_blocks())


def test_a_model_on_disk_is_refused(tmp_path: Path) -> None:
    lively_model("llama", **SIX, tie_word_embeddings=False).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), on_disk=True)
    with pytest.raises(InputError, match="`model.on_disk` must be false for Shrink with Depth or HiddenWidth"):
        Recipe(Shrink([Depth(), CHANNELS]), 0.3).check(model)


def test_counts() -> None:
    counts = Counts(80, 20)
    assert counts.without((1, 0), 0.25) == (60, 20)
    assert counts.without((0.5, 1), 0.5).total == 60 + 10
    model = six_blocks()
    found = Counts.of(model, find_blocks(model))
    assert found.total == parameters(model)
    assert found.others == model.get_input_embeddings().weight.numel() + 32


def test_sizes_are_shares_of_all_parameters(batches: list[Tensor]) -> None:
    model = six_blocks()
    pruned = prune(model, batches, Recipe(Shrink(ALL), 0.3))
    assert weighted_mean(pruned.achieved, pruned.sizes) == pytest.approx(pruned.sparsity)
    assert all(isinstance(size, int) for size in pruned.sizes)


def test_a_plan_of_another_mean_is_refused(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.yaml", [0.4] * 6, [1.0] * 6, "by hand")
    with pytest.raises(InputError, match="`Plan.path`: the mean of the rates .* must be the mean sparsity of the blo"):
        Recipe(Shrink([Depth(), HeadGroups()]), 0.35, Plan(str(tmp_path / "plan.yaml"))).check(six_blocks())


def test_a_block_that_a_plan_removes_has_a_rate_of_1(batches: list[Tensor], tmp_path: Path) -> None:
    rates = [0.2, 0.2, 0.2, 1.0, 0.2, 0.2]
    write_plan(tmp_path / "plan.yaml", rates, rates, "by hand")
    model = six_blocks()
    plan, method = Plan(str(tmp_path / "plan.yaml")), Shrink([Depth(), CHANNELS])
    pruned = prune(model, batches, Recipe(method, round(2 / 6, 6), plan))
    assert pruned.achieved[3] > 0.9


@pytest.mark.parametrize(
    ("method", "fields", "sparsity"),
    [
        (Shrink([HiddenWidth(multiple=6), HeadGroups(), CHANNELS]), {"num_attention_heads": 6, "hidden_size": 48}, 0.3),
        (Shrink([Depth(), HeadGroups(), CHANNELS]), {"num_attention_heads": 8, "hidden_size": 64}, 0.08),
    ],
    ids=["width", "depth"],
)
def test_sizes_that_the_config_does_not_accept_together(
    method: Shrink, fields: dict[str, int], sparsity: float, batches: list[Tensor]
) -> None:
    groups = fields["num_attention_heads"] if fields["hidden_size"] == 64 else 3
    model = lively_model("llama", **SIX, **fields, num_key_value_heads=groups)
    with pytest.raises(InputError, match="must leave sizes that the config accepts together, got .*num_attention_head"):
        Recipe(method, sparsity).check(model)


@pytest.mark.parametrize("sparsity", [0.2, 0.45, 0.6])
def test_the_sizes_are_known_before(sparsity: float, batches: list[Tensor]) -> None:
    model, method = six_blocks(), Shrink(ALL)
    blocks = find_blocks(model)
    expected = method._stages.sizes_in_config(model, blocks, [sparsity] * 6)  # type: ignore[union-attr]
    prune(model, batches, Recipe(method, sparsity))
    found = {name: getattr(model.config, name) for name in expected}
    channels = "intermediate_size"
    assert found | {channels: 0} == expected | {channels: 0}
    assert found[channels] == pytest.approx(expected[channels], abs=1)


def test_the_sparsity_is_that_of_all_parameters() -> None:
    assert Recipe(Shrink([Depth(), CHANNELS]), 0.3).budget == "parameters"
    assert Recipe(Shrink([HeadGroups(), CHANNELS]), 0.3).budget == "linears"


def test_a_model_that_had_another_shape_is_not_called_dense(batches: list[Tensor]) -> None:
    model = six_blocks()
    recipe = Recipe(Shrink([Depth(), CHANNELS]), 0.3)
    assert [prune(model, batches, recipe).reshaped_before for _ in range(2)] == [False, True]
