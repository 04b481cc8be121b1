from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_prune.allocate import DLP, Uniform
from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import measure
from lit_prune.evaluation.sizes import parameters, size_bytes
from lit_prune.evaluation.speed import Speed
from lit_prune.fit.cut import CutInputs
from lit_prune.masks.zeros import zeros
from lit_prune.models.on_disk import Offload
from lit_prune.pipeline import score_with_statistics
from lit_prune.pruning import Magnitude, Wanda
from lit_prune.recipe import Recipe, recipe_record
from lit_prune.slice import Slicing
from tests.conftest import small_model
from tests.fit.cuts import cut

CPU = torch.device("cpu")
RECIPE = Recipe(Magnitude(), 0.5, Uniform())


def batches(seed: int = 0) -> list[Batch]:
    return [{"input_ids": torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(seed))}]


def inputs(recipe: Recipe = RECIPE, validation: Any = None, **fields: Any) -> CutInputs:
    return CutInputs(recipe, batches(), {"num_samples": 4}, validation, CPU, **fields)


def test_a_cut_is_made_and_measured_on_both_sides() -> None:
    model, validation = small_model(), batches(1)
    dense = measure(model, validation, "val").perplexity
    record = cut(model, inputs(validation=(validation, "val"), step=3))
    pruned = measure(model, validation, "val")
    assert record.perplexity == {"before": pytest.approx(dense), "after": pytest.approx(pruned.perplexity)}
    assert dense != pytest.approx(pruned.perplexity)
    assert record.protocol == pruned.protocol
    zero, total = zeros(weight for name, weight in model.named_parameters() if "_proj" in name)
    assert record.sparsity == pytest.approx(zero / total) == pytest.approx(0.5, abs=1e-3)
    assert (record.step, record.target, record.rates) == (3, 0.5, [0.5] * 3)
    assert record.achieved == pytest.approx([0.5] * 3, abs=1e-3)
    assert record.calibration == {"num_samples": 4}
    assert record.recipe == recipe_record(RECIPE)
    assert list(record.seconds) == ["perplexity_before", "score", "prune", "perplexity_after"]
    assert record.size == {}
    assert record.search is None


@pytest.mark.parametrize(("validation", "measured"), [(None, True), ((batches(1), "val"), False)])
def test_without_validation_nothing_is_measured(validation: Any, measured: bool) -> None:
    record = cut(small_model(), inputs(validation=validation, measured=measured))
    assert record.perplexity == {}
    assert record.protocol is None
    assert list(record.seconds) == ["score", "prune"]
    assert record.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("measured", [True, False])
def test_a_cut_that_changes_shapes_says_what_the_model_weighs(measured: bool) -> None:
    model = small_model()
    dense = parameters(model)
    record = cut(model, inputs(Recipe(Slicing(), 0.25), measured=measured))
    before, after = record.size["before"], record.size["after"]
    assert (before.parameters, after.parameters) == (dense, parameters(model))
    assert (before.bytes, after.bytes) == (4 * before.parameters, 4 * after.parameters)
    assert all((size.speed is not None and size.speed.decode > 0) is measured for size in (before, after))


def test_both_speeds_of_a_cut_are_measured_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small_model(), []
    dense = parameters(model)

    def compare(models: list[Any]) -> list[Speed]:
        seen.extend(parameters(one) for one in models)
        return [Speed(1.0, 2.0), Speed(3.0, 4.0)]

    monkeypatch.setattr("lit_prune.fit.cut.compare_speed", compare)
    record = cut(model, inputs(Recipe(Slicing(), 0.25)))
    assert seen == [dense, parameters(model)]
    assert [record.size[when].speed for when in ("before", "after")] == [Speed(1.0, 2.0), Speed(3.0, 4.0)]


def test_a_device_without_memory_for_both_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: object) -> list[Speed]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("lit_prune.fit.cut.compare_speed", full)
    record = cut(small_model(), inputs(Recipe(Slicing(), 0.25)))
    assert [size.speed for size in record.size.values()] == [None, None]
    printed = capsys.readouterr()
    assert "both models together do not fit" in printed.out + printed.err


@pytest.mark.parametrize("where", ["sharded", "on disk", "little memory"])
def test_speeds_are_measured_apart_where_no_second_model_fits(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    if where == "on disk":
        monkeypatch.setattr("lit_prune.fit.cut.on_disk", lambda _: Offload())
    if where == "little memory":
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=size_bytes(model)))
    monkeypatch.setattr("lit_prune.fit.cut.compare_speed", lambda _: pytest.fail("two models were in memory"))
    monkeypatch.setattr("lit_prune.fit.cut.tokens_per_second", lambda _: Speed(1.0, 2.0))
    record = cut(model, inputs(Recipe(Slicing(), 0.25), moves=where != "sharded"))
    assert [size.speed for size in record.size.values()] == [Speed(1.0, 2.0)] * 2


def test_a_second_cut_knows_what_was_removed_before() -> None:
    model = small_model()
    assert cut(model, inputs()).sparsity_before == 0
    second = cut(model, inputs(Recipe(Magnitude(), 0.6, Uniform())))
    assert second.sparsity_before == pytest.approx(0.5, abs=1e-3)


def test_stored_statistics_are_read_in_place_of_a_pass() -> None:
    recipe = Recipe(Wanda(), 0.5, DLP())
    scored, stored = score_with_statistics(small_model(), batches(), recipe)
    record = cut(small_model(), inputs(recipe, statistics=stored))
    assert record.rates == scored.rates
    assert record.scores == scored.scores
