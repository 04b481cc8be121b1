"""Statistics that are computed once: the file, the cuts that they serve, those that are refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, OWL, Allocation, AlphaPruning, LayerRedundancy, Uniform
from lit_prune.calibration.cached_statistics import FILE, CachedStatistics, key_of, read_statistics, write_statistics
from lit_prune.calibration.statistics import COSINE, GRAM, INPUTS
from lit_prune.errors import InputError
from lit_prune.pipeline import check_expected_statistics, check_statistics, prune, score, score_with_statistics
from lit_prune.pruning import Magnitude, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.slice import Slicing
from tests.conftest import FAMILIES, small_model

Batches = list[torch.Tensor]
ALL = Recipe(SparseGPT(propagate="dense"))


def cached(model: PreTrainedModel, batches: Batches, folder: Path, recipe: Recipe = ALL) -> CachedStatistics:
    write_statistics(folder / FILE, score_with_statistics(model, batches, recipe, settings={"model": "small"})[1])
    return read_statistics(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_back_what_was_written(family: str, batches: Batches, tmp_path: Path) -> None:
    model = small_model(family)
    _, stored = score_with_statistics(model, batches, ALL, settings={"model": "small"})
    write_statistics(tmp_path / FILE, stored)
    read = read_statistics(tmp_path / FILE)
    assert read.key == stored.key == key_of(model, batches, {"model": "small"})
    assert read.kinds == stored.kinds == {INPUTS, COSINE, GRAM}
    assert read.scores == stored.scores
    for one, other in zip(read.by_block, stored.by_block, strict=True):
        assert (one.cosine, one.shared_inputs) == (other.cosine, other.shared_inputs)
        for mine, theirs in ((one.norms, other.norms), (one.grams, other.grams)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert len({id(gram) for gram in one.grams.values()}) == len({id(gram) for gram in other.grams.values()})


@pytest.mark.parametrize("allocation", [DLP(), OWL(), AlphaPruning(), LayerRedundancy(), Uniform()], ids=str)
@pytest.mark.parametrize(
    "method", [Magnitude(), Wanda(), Wanda(propagate="pruned"), SparseGPT(), SparseGPT(propagate="dense")], ids=str
)
def test_one_look_serves_every_recipe(
    method: Magnitude | Wanda | SparseGPT, allocation: Allocation, batches: Batches, tmp_path: Path
) -> None:
    recipe = Recipe(method, 0.6, allocation)
    stored = cached(small_model(), batches, tmp_path)
    one, other = small_model(), small_model()
    fresh, reused = prune(one, batches, recipe), prune(other, batches, recipe, statistics=stored)
    assert fresh.scores == reused.scores
    assert fresh.rates == reused.rates
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_nothing_runs_where_statistics_are_stored(
    batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    stored = cached(model, batches, tmp_path)
    monkeypatch.setattr("lit_prune.pipeline.Stream", lambda *_: pytest.fail("the model ran"))
    assert score(model, batches, Recipe(), statistics=stored).scores
    prune(model, batches, Recipe(), statistics=stored)


def test_scores_are_kept_by_allocation_and_linears(
    batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = small_model(), Recipe(Magnitude(), 0.4, AlphaPruning())
    first = cached(model, batches, tmp_path)
    scored, second = score_with_statistics(model, batches, recipe, statistics=first)
    assert set(second.scores) == {repr(ALL.allocation), repr(recipe.allocation)}
    monkeypatch.setattr(AlphaPruning, "score", lambda *_: 7.0)
    assert score(model, batches, recipe, statistics=second).scores == scored.scores
    some = dataclasses.replace(recipe, targets=["down_proj"])
    assert score(model, batches, some, statistics=second).scores == [7.0] * 3


def test_the_key_is_of_rows_not_of_batches(batches: Batches) -> None:
    model, rows = small_model(), torch.cat(batches)
    assert key_of(model, batches) == key_of(model, [rows])
    assert key_of(model, [rows]) == key_of(model, [{"input_ids": rows, "attention_mask": torch.ones_like(rows)}])
    mask = torch.ones_like(rows)
    mask[0, 0] = 0
    assert key_of(model, [rows]).tokens != key_of(model, [{"input_ids": rows, "attention_mask": mask}]).tokens


def test_what_differs_is_said(batches: Batches, tmp_path: Path) -> None:
    model = small_model()
    stored = cached(model, batches, tmp_path)
    with pytest.raises(InputError, match="statistics.safetensors differs: other calibration tokens. Run"):
        prune(model, batches[:-1], Recipe(), statistics=stored)
    with pytest.raises(InputError, match="other calibration tokens; `model` small, now big. Run `lit-prune score`"):
        check_statistics(stored, model, batches[:-1], Recipe(), {"model": "big"})
    old = dataclasses.replace(
        stored, key=dataclasses.replace(stored.key, versions=stored.key.versions | {"torch": "1"})
    )
    with pytest.raises(InputError, match="differs: torch 1, now 2"):
        prune(model, batches, Recipe(), statistics=old)
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] += 1
    with pytest.raises(InputError, match="differs: other weights. Run"):
        score(model, batches, Recipe(), statistics=stored)


def test_a_setting_of_the_function_is_part_of_the_key(batches: Batches) -> None:
    one, other = small_model(), small_model()
    other.config.rms_norm_eps *= 2
    assert key_of(one, batches).weights != key_of(other, batches).weights
    other.config.rms_norm_eps /= 2
    other.config.use_cache = False
    assert key_of(one, batches) == key_of(other, batches)


def test_what_is_not_there_is_said(batches: Batches, tmp_path: Path) -> None:
    model = small_model()
    stored = cached(model, batches, tmp_path, Recipe(Wanda(), targets=["q_proj"]))
    with pytest.raises(InputError, match=r"must hold gram, which this cut needs, .* holds cosine, inputs. Run"):
        prune(model, batches, dataclasses.replace(ALL, targets=["q_proj"]), statistics=stored)
    with pytest.raises(InputError, match="lacks self_attn.k_proj of block 0. Run"):
        prune(model, batches, Recipe(Wanda()), statistics=stored)
    prune(small_model(), batches, Recipe(Slicing(multiple=4), 0.25, LayerRedundancy()), statistics=stored)
    read = {"model": "small", "calibration.num_samples": 4, "calibration.seq_length": 16}
    check_expected_statistics(stored, model, Recipe(Wanda(), targets=["q_proj"]), read)
    with pytest.raises(InputError, match=r"must be of this model, which has 4 blocks, .* is of 3\. Run `lit-prune sc"):
        check_expected_statistics(stored, small_model(num_hidden_layers=4), Recipe(Slicing()), read)


def test_no_file_of_statistics(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`pruning.statistics` must be a file that exists"):
        read_statistics(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("other", "text"):
        with pytest.raises(InputError, match=f"must be a file of `lit-prune score`, .*{name}.safetensors is not"):
            read_statistics(tmp_path / f"{name}.safetensors")
