from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, OWL, Allocation, AlphaPruning, LayerRedundancy, Uniform
from lit_prune.allocate.base import weighted_mean
from lit_prune.calibration.statistics import BlockStatistics, InputStatistics
from lit_prune.depth import Depth
from lit_prune.errors import InputError
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune, score, score_with_statistics
from lit_prune.pruning import (
    Magnitude,
    MaskMethod,
    Method,
    MixedNofM,
    NofM,
    Pattern,
    ScoredMethod,
    SparseGPT,
    Unstructured,
    Wanda,
)
from lit_prune.recipe import Recipe
from lit_prune.shrink import MLPWidth, Shrink
from tests.conftest import inputs_by_linear, small_model

CASES: list[tuple[Pattern, float, Allocation]] = [
    (Unstructured(), 0.5, DLP()),
    (NofM(2, 4), 0.5, Uniform()),
    (MixedNofM(8), 0.55, OWL()),
]
RECIPES = [Recipe(method(pattern), *rest) for method in (Magnitude, Wanda, SparseGPT) for pattern, *rest in CASES]
RECIPES += [
    Recipe(Magnitude(), 0.3, LayerRedundancy()),
    Recipe(Magnitude(), 0.4, AlphaPruning()),
    Recipe(Wanda(propagate="pruned"), 0.7, DLP()),
    Recipe(Wanda(NofM(2, 4), "pruned"), 0.5, Uniform()),
    Recipe(SparseGPT(propagate="dense"), 0.7, Uniform()),
]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_linear_loses_exactly_its_rate(
    any_model: PreTrainedModel, batches: list[torch.Tensor], recipe: Recipe
) -> None:
    before = weights(any_model)
    pruned, pattern = prune(any_model, batches, recipe), recipe.method.pattern
    for block in find_blocks(any_model):
        rate = pruned.rates[block.index]
        for linear in block.linears.values():
            gone_OI = linear.weight_OI == 0
            assert gone_OI.sum() == round(gone_OI.numel() * rate)
            if pattern.columns is not None:
                assert (gone_OI.unflatten(1, (-1, pattern.columns)).sum(-1) == round(pattern.columns * rate)).all()
    step = max(pruned.sizes) / sum(pruned.sizes) / 8 if isinstance(pattern, MixedNofM) else 0
    assert weighted_mean(pruned.rates, pruned.sizes) == pytest.approx(recipe.sparsity, abs=step / 2 + 1e-6)
    assert pruned.sparsity == pytest.approx(weighted_mean(pruned.rates, pruned.sizes), abs=1e-3)
    assert torch.isfinite(any_model(batches[0]).logits).all()
    touched = {id(linear.parameter) for block in find_blocks(any_model) for linear in block.linears.values()}
    for name, tensor in any_model.named_parameters():
        if id(tensor) not in touched:
            assert torch.equal(tensor, before[name])
        elif isinstance(recipe.method, ScoredMethod):  # others may adjust the weights that stay
            kept = tensor != 0
            assert torch.equal(tensor[kept], before[name][kept])


def test_scoring_changes_nothing(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    before = weights(model)
    scored = score(model, batches, Recipe())
    assert len(scored.scores) == len(scored.rates) == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert structure.record(model) == {}


def test_scores_by_one_plain_forward(any_model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    block = find_blocks(any_model)[1]
    given = inputs_by_linear(any_model, block, batches)
    observed = BlockStatistics({name: x_PI.square().mean(0).sqrt() for name, x_PI in given.items()})
    expected = DLP().score({name: linear.weight_OI for name, linear in block.linears.items()}, observed)
    assert score(any_model, batches, Recipe()).scores[1] == pytest.approx(expected, rel=1e-5)


def test_scoring_takes_what_the_allocation_reads_and_no_more(
    model: PreTrainedModel, batches: list[torch.Tensor]
) -> None:
    seen = score(model, batches, Recipe(Wanda(), 0.5, LayerRedundancy())).statistics
    assert all(observed.cosine is not None and not observed.norms for observed in seen)


@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_batch_size_does_not_matter(batches: list[torch.Tensor], batch_size: int) -> None:
    one, other = small_model(), small_model()
    prune(one, batches, Recipe())
    prune(other, list(torch.cat(batches).split(batch_size)), Recipe())
    same = [bool(((a == 0) == (b == 0)).all()) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    assert all(same)


def test_pruned_statistics_see_the_pruned_blocks_before(batches: list[torch.Tensor]) -> None:
    norms: dict[str, list[torch.Tensor]] = {"dense": [], "pruned": []}

    class Spy(MaskMethod):
        needs = Wanda.needs

        def __init__(self, propagate: str) -> None:
            self.propagate = propagate  # type: ignore[assignment]

        def prune(self, weights: Sequence[torch.Tensor], seen: InputStatistics, rate: float) -> list[torch.Tensor]:
            assert seen.norm_I is not None
            norms[self.propagate].append(seen.norm_I)
            return Wanda().prune(weights, seen, rate)

    for propagate in norms:
        prune(small_model(), batches, Recipe(Spy(propagate), 0.6, Uniform()))
    assert torch.equal(norms["dense"][0], norms["pruned"][0])  # nothing is pruned before the first block
    assert not torch.allclose(norms["dense"][-1], norms["pruned"][-1])


def test_pruned_stays_pruned_at_a_later_cut(
    model: PreTrainedModel, batches: list[torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    prune(model, batches, Recipe(sparsity=0.4))
    gone = {name: tensor == 0 for name, tensor in weights(model).items()}
    capsys.readouterr()
    second = prune(model, batches, Recipe(sparsity=0.6))
    assert "40.0% of the weights to prune is gone already, and counts toward the sparsity." in capsys.readouterr().err
    assert second.sparsity == pytest.approx(0.6, abs=1e-3)
    assert all((model.state_dict()[name][where] == 0).all() for name, where in gone.items())
    stays = r"must be at least the current sparsity, 0.(59\d*|6): weights that are pruned stay pruned; got 0.3"
    with pytest.raises(InputError, match=stays):
        prune(model, batches, Recipe(sparsity=0.3))


@pytest.mark.parametrize("method", [Depth(), Depth(refit=True), MLPWidth(8), Shrink([MLPWidth(8)])], ids=repr)
def test_a_cut_that_rounds_to_nothing_says_so(
    method: Method, model: PreTrainedModel, batches: list[torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    before, name = weights(model), type(method).__name__
    prune(model, batches, Recipe(method, 0.0))
    assert "removed nothing" not in capsys.readouterr().err
    pruned = prune(model, batches, Recipe(method, 0.02))
    assert pruned.sparsity == 0
    told = f"{name} removed nothing: a sparsity of 0.02 is less than half of its smallest step"
    assert told in capsys.readouterr().err
    assert structure.describe(model)[-1].achieved == 0
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_cut_that_an_earlier_one_has_made_says_so(
    model: PreTrainedModel, batches: list[torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert "removed nothing" not in capsys.readouterr().err
        prune(model, batches, Recipe(MLPWidth(8), 0.5))
    assert "MLPWidth removed nothing: a sparsity of 0.5 was reached by an earlier cut" in capsys.readouterr().err


def test_cached_scores_are_not_announced(
    model: PreTrainedModel, batches: list[torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    _, statistics = score_with_statistics(model, batches, Recipe())
    assert "Scoring blocks" in capsys.readouterr().err
    score(model, batches, Recipe(sparsity=0.6), statistics=statistics)
    assert "Scoring blocks" not in capsys.readouterr().err


def test_the_record_travels_in_the_config(
    model: PreTrainedModel, batches: list[torch.Tensor], tmp_path: object
) -> None:
    pruned = prune(model, batches, Recipe(sparsity=0.25, targets=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    opened = type(model).from_pretrained(str(tmp_path))
    record = structure.record(opened)
    assert record["rates"] == pruned.rates
    assert record["recipe"]["sparsity"] == 0.25
    assert record["recipe"]["method"].startswith("Wanda(")
    assert record["recipe"]["targets"] == ["q_proj"]


def test_training_mode_and_dicts_with_padding(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    model.train()
    mask = torch.ones_like(batches[0])
    mask[:, 10:] = 0
    prune(model, [{"input_ids": batches[0], "attention_mask": mask}], Recipe())
    assert model.training


def test_batches_that_cannot_be(model: PreTrainedModel) -> None:
    for batch, got in ((torch.arange(8), r"\(8,\)"), ("text", "str"), ({"input_ids": [1, 2]}, "list")):
        with pytest.raises(InputError, match=rf"`input_ids` of shape \(windows, tokens\), got {got}: add a dimension"):
            score(model, [batch])  # type: ignore[list-item]
    with pytest.raises(InputError, match="at least one batch"):
        prune(model, [], Recipe())
    with pytest.raises(InputError, match=r"`calibration.seq_length` must be at most 64, .*got 65"):
        prune(model, [torch.ones(1, 65, dtype=torch.long)], Recipe())


def test_nothing_is_touched_when_nothing_can_be_done(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    before = weights(model)
    with pytest.raises(InputError, match="between 0 and 0.4"):
        prune(model, batches, Recipe(sparsity=0.5, max_rate=0.4))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
