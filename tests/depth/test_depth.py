"""Which blocks are removed, and how many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from lit_prune.allocate import DLP, OWL, Allocation, AlphaPruning, Arithmetic, LayerRedundancy, Plan, Uniform
from lit_prune.calibration.stream import Stream
from lit_prune.depth import Depth
from lit_prune.depth.distance import distances
from lit_prune.depth.remaining import RemainingBlocks
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.masks.zeros import zeros
from lit_prune.models.families import find_blocks
from lit_prune.models.load import load_model
from lit_prune.models.on_disk import offload_folder, save
from lit_prune.models.structure import structures
from lit_prune.pipeline import Pruned, prune, score
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.shrink import MLPWidth
from lit_prune.slice import Slicing
from tests.conftest import lively_model, small_model
from tests.depth.skipping import skipping
from tests.shrink.given import Given

SIX = {"num_hidden_layers": 6}
FOR_WEIGHTS = (DLP(), OWL(), AlphaPruning(), Arithmetic(difference=0.01))


def cut(
    model: PreTrainedModel, batches: list[Tensor], method: Depth, sparsity: float, allocation: Allocation
) -> Pruned:
    return prune(model, batches, Recipe(method, sparsity, allocation))


def by_distance(batches: list[Tensor], length: int) -> list[int]:
    """The runs of blocks of a model of six, in the order of their distances."""
    model = lively_model("llama", **SIX)
    blocks = find_blocks(model)
    stream = Stream(model, blocks, [{"input_ids": batch} for batch in batches], model.device)
    found = distances(stream, blocks, length)
    return sorted(range(len(found)), key=lambda begin: found[begin])


def remaining(model: PreTrainedModel) -> list[int]:
    structure = structures(model)[0]
    assert isinstance(structure, RemainingBlocks)
    return list(structure.remaining)


@torch.no_grad()
@pytest.mark.parametrize("allocation", [Uniform(), LayerRedundancy()], ids=repr)
def test_the_blocks_that_change_the_stream_least(allocation: Allocation, batches: list[Tensor]) -> None:
    model, dense = lively_model("llama", **SIX), lively_model("llama", **SIX)
    gone = by_distance(batches, 1)[:2]
    result = cut(model, batches, Depth(), 1 / 3, allocation)
    assert result.achieved == [float(block in gone) for block in range(6)]
    assert result.sparsity == pytest.approx(1 / 3)
    assert remaining(model) == [block for block in range(6) if block not in gone]
    assert type(model) is LlamaForCausalLM
    with skipping(dense, gone):
        torch.testing.assert_close(model(batches[0]).logits, dense(batches[0], use_cache=False).logits)


def test_a_gap_of_neighbours(batches: list[Tensor]) -> None:
    model = lively_model("llama", **SIX)
    begin = by_distance(batches, 2)[0]
    result = cut(model, batches, Depth(contiguous=True), 1 / 3, Uniform())
    assert result.achieved == [float(begin <= block < begin + 2) for block in range(6)]
    assert parameters(model) == parameters(lively_model("llama", num_hidden_layers=4))


def test_scores_tell_which_blocks_would_go(batches: list[Tensor]) -> None:
    scored = score(lively_model("llama", **SIX), batches, Recipe(Depth(), 0.5, LayerRedundancy()))
    gone = by_distance(batches, 1)[:3]
    assert scored.rates == [float(block in gone) for block in range(6)]


def test_a_plan(batches: list[Tensor], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({0: 0, 1: 1, 2: 0, 3: 0, 4: 1, 5: 0}))
    model = lively_model("llama", **SIX)
    cut(model, batches, Depth(), 1 / 3, Plan(str(plan)))
    assert remaining(model) == [0, 2, 3, 5]


def test_one_cut_after_another(batches: list[Tensor]) -> None:
    model = lively_model("llama", **SIX)
    first = cut(model, batches, Depth(), 0.2, Uniform())  # 1.2 blocks
    left = remaining(model)
    assert len(left) == 5
    assert first.sparsity == pytest.approx(1 / 6)
    second = cut(model, batches, Depth(), 0.5, LayerRedundancy())
    assert second.sparsity_before == pytest.approx(1 / 6)
    assert second.sparsity == pytest.approx(0.5)
    assert len(second.achieved) == 5
    assert sorted(second.achieved) == pytest.approx([1 / 6] * 3 + [1] * 2)
    assert set(remaining(model)) < set(left)
    assert model.config.num_hidden_layers == len(remaining(model)) == 3
    with pytest.raises(InputError, match="`pruning.sparsity` must be at least the current sparsity, 0.5"):
        cut(model, batches, Depth(), 0.3, Uniform())
    same = cut(model, batches, Depth(), 0.5, Uniform())
    assert same.sparsity == pytest.approx(0.5)


def test_a_share_of_all_parameters(batches: list[Tensor]) -> None:
    model = small_model(**SIX)
    full, block = parameters(model), parameters(model.model.layers[0])
    for share, left in ((0.2, 5), (0.5, 3)):  # blocks have 93% of the parameters
        prune(model, batches, Recipe(Depth(), share, Uniform(), budget="parameters"))
        assert model.config.num_hidden_layers == left
        assert abs(1 - parameters(model) / full - share) <= block / full / 2
    with pytest.raises(InputError, match="must be between .* and 0.7[0-9]* of all parameters .* got 0.9"):
        prune(model, batches, Recipe(Depth(), 0.9, Uniform(), budget="parameters"))


def test_a_size_is_met_by_blocks_that_have_become_smaller_since_an_earlier_cut(batches: list[Tensor]) -> None:
    model = small_model(num_hidden_layers=10)
    cut(model, batches, Depth(), 0.2, Uniform())
    prune(model, batches, Recipe(MLPWidth(multiple=8), 0.75, Uniform()))
    target = parameters(model) - 2 * parameters(model.model.layers[0])
    prune(model, batches, Recipe(Depth(), allocation=Uniform(), target_parameters=target))
    assert parameters(model) == target
    assert model.config.num_hidden_layers == 6


def test_blocks_of_different_sizes_are_told(
    batches: list[Tensor], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_prune.progress._told", set())
    model = small_model(**SIX)
    recipe = Recipe(Depth(), 0.4, Uniform(), budget="parameters")
    recipe.check(model)
    assert "parameters as equal" not in capsys.readouterr().err
    prune(model, batches, Recipe(MLPWidth(multiple=8), 0.25, Given((0.5, 0.0, 0.5, 0.0, 0.5, 0.0))))
    smaller, larger = (parameters(model.model.layers[block]) for block in (0, 1))
    recipe.check(model)
    told = f"Depth counts blocks of {smaller:,} to {larger:,} parameters as equal: what remains depends on which go."
    assert told in capsys.readouterr().err


@torch.no_grad()
def test_the_mlp_in_front_makes_up_for_a_gap(batches: list[Tensor]) -> None:
    dense = lively_model("llama", **SIX)
    expected, errors = dense(batches[0]).logits, []
    for refit in (False, True):
        model = lively_model("llama", **SIX)
        cut(model, batches, Depth(contiguous=True, refit=refit), 1 / 3, Uniform())
        errors.append(float((model(batches[0]).logits - expected).norm()))
    assert errors[1] < errors[0]


def test_masks_keep_their_zeros(batches: list[Tensor]) -> None:
    model = lively_model("llama", **SIX)
    prune(model, batches, Recipe(Magnitude(), 0.5, Uniform()))
    with pytest.raises(InputError, match="`Depth.refit` must be false for a model with masks"):
        cut(model, batches, Depth(refit=True), 1 / 3, Uniform())
    cut(model, batches, Depth(), 1 / 3, Uniform())
    zero, total = zeros(linear.weight_OI for block in find_blocks(model) for linear in block.linears.values())
    assert zero == total // 2
    assert len(remaining(model)) == 4


@torch.no_grad()
def test_weights_that_stay_on_disk(batches: list[Tensor], tmp_path: Path) -> None:
    lively_model("llama", **SIX, tie_word_embeddings=False).save_pretrained(tmp_path / "dense")
    in_memory = load_model(str(tmp_path / "dense"))
    mapped = load_model(str(tmp_path / "dense"), on_disk=True)
    for model in (in_memory, mapped):
        with offload_folder(model, tmp_path / "out"):
            cut(model, batches, Depth(refit=True), 1 / 2, LayerRedundancy())
            if model is mapped:
                save(model, tmp_path / "out")
                with pytest.raises(InputError, match="`model.on_disk` must be false for Depth after another cut"):
                    cut(model, batches, Depth(), 2 / 3, LayerRedundancy())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(opened(batches[0]).logits, in_memory(batches[0]).logits)


@pytest.mark.parametrize(
    ("method", "sparsity", "allocation", "message"),
    [
        (Depth(), 0.92, Uniform(), r"`pruning.sparsity` must be at most 0.8333 for Depth, got 0.92: one of 6 blocks"),
        (Depth(contiguous=True), 0.5, LayerRedundancy(), "`pruning.allocation` must be Uniform for Depth with `contig"),
        *(
            (Depth(), 0.5, rule, f"LayerRedundancy or Plan for Depth, got {type(rule).__name__}, ")
            for rule in FOR_WEIGHTS
        ),
    ],
    ids=["sparsity", "contiguous", *(type(rule).__name__ for rule in FOR_WEIGHTS)],
)
def test_settings_that_are_refused(
    method: Depth, sparsity: float, allocation: Allocation, message: str, batches: list[Tensor]
) -> None:
    with pytest.raises(InputError, match=message):
        cut(small_model(**SIX), batches, method, sparsity, allocation)


def test_bounds_of_the_rates_are_refused(batches: list[Tensor]) -> None:
    message = "`pruning.min_rate` must be 0 and `pruning.max_rate` at least 0.99 for Depth, .* got 0.1 and 1"
    with pytest.raises(InputError, match=message):
        prune(small_model(), batches, Recipe(Depth(), 1 / 3, Uniform(), min_rate=0.1, max_rate=1.0))


def test_a_damping_of_zero() -> None:
    with pytest.raises(InputError, match=r"`Depth.damping` must be greater than 0, got 0"):
        Depth(damping=0)


def test_a_sliced_model(batches: list[Tensor]) -> None:
    model = small_model()
    prune(model, batches, Recipe(Slicing(), 0.25, Uniform()))
    with pytest.raises(InputError, match="`model` must not be sliced for Depth"):
        cut(model, batches, Depth(), 1 / 3, Uniform())
    model = small_model()
    cut(model, batches, Depth(), 1 / 3, Uniform())
    prune(model, batches, Recipe(Slicing(), 0.25, Uniform()))
    assert model.config.num_hidden_layers == 2


def test_a_reconstruction_is_refused() -> None:
    from lit_prune.reconstruct import Reconstruct

    with pytest.raises(InputError, match="`pruning.reconstruction` must be null for Depth"):
        Recipe(Depth(), 0.5, Uniform(), reconstruction=Reconstruct())
