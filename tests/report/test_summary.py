from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.depth import Depth
from lit_prune.evaluation.sizes import parameters
from lit_prune.evaluation.speed import Speed
from lit_prune.export.formats import GGUF
from lit_prune.export.plan import ExportPlan
from lit_prune.fit.baseline import measure_baseline
from lit_prune.fit.cut import CutInputs, measured_cut
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude, Wanda
from lit_prune.recipe import Recipe, recipe_record
from lit_prune.recover import LoRA, MaskedLoRA
from lit_prune.report.card import model_card
from lit_prune.report.records import CutRecord, ModelSize
from lit_prune.report.report import Report
from lit_prune.report.summary import summary
from lit_prune.report.wording import describe_size
from lit_prune.schedule import Cut
from lit_prune.shrink import HeadGroups, MLPWidth
from lit_prune.slice import Slicing
from tests.conftest import lively_model, small_model
from tests.fit.cuts import cut
from tests.report.reports import CUT, SEARCH

CPU = torch.device("cpu")
RECIPE = Recipe(Magnitude(), 0.5, Uniform())
LINEARS = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)


def pruned(recipe: Recipe = RECIPE) -> tuple[PreTrainedModel, CutRecord]:
    model = small_model()
    batches = [{"input_ids": torch.arange(1, 17)[None]}]
    return model, cut(model, CutInputs(recipe, batches, {"num_samples": 1}, None, CPU))


def report(model: PreTrainedModel, recipe: Recipe | None, *args: Any, **fields: Any) -> Report:
    return summary(ExportPlan.of(model), recipe, *args, **fields)


def test_zeros_are_counted_over_the_linears_and_over_everything() -> None:
    model, record = pruned()
    found = report(model, RECIPE, [record])
    assert found.sparsity.requested == found.sparsity.target == 0.5
    assert found.sparsity.achieved_linears == 0.5
    assert found.sparsity.missed == 0
    assert found.sparsity.before is None
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert zeros >= LINEARS // 2
    assert found.sparsity.achieved_all == zeros / found.parameters
    assert found.parameters == parameters(model)
    assert found.bytes == 4 * found.parameters
    assert found.masked


def test_a_head_that_is_no_longer_tied_is_counted() -> None:
    model, record = pruned()
    MaskedLoRA(target_modules=["lm_head", "up_proj"]).attach(model)
    found, before = report(model, RECIPE, [record]), parameters(small_model())
    assert (found.parameters, found.untied_parameters) == (before + 64 * 32, 64 * 32)
    assert found.bytes == 4 * found.parameters
    assert found.sparsity.achieved_all == (LINEARS // 2 + 32) / found.parameters  # and the embedding of the padding
    assert "2,048 of them are the head, which is no longer tied to the embedding" in describe_size(found)


def test_the_last_cut_gives_scores_and_rates_and_all_are_listed() -> None:
    model, _ = pruned()
    first = replace(CUT, step=0, rates=[0.2] * 3, perplexity={"before": 20.0, "after": 30.0}, search=SEARCH)
    last = replace(CUT, step=4, perplexity={"before": 25.0, "after": 60.0, "quantised": 66.0})
    found = report(model, RECIPE, [first, last], cuts_not_made=[Cut(9, 0.6)])
    assert (found.scores, found.rates, found.achieved, found.search) == (last.scores, last.rates, last.achieved, None)
    assert [cut.step for cut in found.cuts] == [0, 4]
    assert found.cuts_not_made == [Cut(9, 0.6)]
    assert found.perplexity == {"dense": 20.0, "pruned": 60.0, "quantised": 66.0, "recovered": None}
    assert found.seconds == {"perplexity_dense": 1.0, "score": 4.0, "prune": 6.0, "perplexity_pruned": 9.0}
    assert found.sparsity.target == 0.5
    assert report(model, RECIPE, [last, first]).search == SEARCH


def test_a_model_that_had_zeros_is_not_called_dense() -> None:
    model, _ = pruned()
    found = report(model, RECIPE, [replace(CUT, sparsity_before=0.25)])
    assert found.sparsity.before == 0.25
    assert list(found.perplexity) == ["before", "pruned", "recovered"]
    assert "perplexity_before" in found.seconds


def test_a_masked_model_that_loses_blocks_has_its_zeros_and_is_not_called_dense(batches: list[Tensor]) -> None:
    model, recipe = lively_model("llama"), Recipe(Depth(), 1 / 3, Uniform())
    prune(model, batches, Recipe(Wanda(), 0.5, Uniform()))
    inputs = CutInputs(recipe, batches, {}, None, torch.device("cpu"), measured=False)
    with measured_cut(model, inputs) as cut:
        cut.pruned = prune(model, batches, recipe)
    found = report(model, recipe, [cut.record])
    assert list(found.perplexity) == ["before", "pruned", "recovered"]
    assert found.shape is not None
    assert (found.masked, found.shape.reference) == (True, "before")
    assert found.sparsity.achieved_linears == pytest.approx(0.5, abs=0.01)
    card = model_card(found, "base", "")
    assert "Of the linears' weights that remain, 50.00% are zero, by earlier masks." in card
    assert report(model, recipe, []).perplexity == {"before": None, "pruned": None, "recovered": None}


def test_a_model_that_was_trained_before_its_first_cut_is_not_called_dense() -> None:
    found = report(pruned()[0], RECIPE, [replace(CUT, step=4, perplexity={"before": 25.0, "after": 60.0})])
    assert found.perplexity == {"before": 25.0, "pruned": 60.0, "recovered": None}


def test_a_run_that_ended_before_its_first_cut() -> None:
    found = report(small_model(), RECIPE, [], cuts_not_made=[Cut(9, 0.5)])
    assert found.perplexity == {"dense": None, "pruned": None, "recovered": None}
    assert (found.sparsity.requested, found.sparsity.achieved_linears, found.sparsity.missed) == (0.5, 0.0, -0.5)
    assert found.recipe is found.scores is found.protocol is None
    assert found.seconds == {}


def test_a_model_that_was_sliced_by_this_run() -> None:
    recipe = Recipe(Slicing(), 0.25)
    model, record = pruned(recipe)
    found = report(model, recipe, [record])
    assert found.shape is not None
    assert found.shape.requested == found.shape.structure.achieved == 0.25
    assert [structure.name for structure in found.structures] == ["slice"]
    assert found.shape.before == record.size["before"]
    assert not found.masked
    assert found.sparsity.requested is None


def test_memory_is_that_of_the_format_where_weights_are_not_converted_on_opening() -> None:
    recipe = Recipe(MLPWidth(multiple=16), 1 / 3, Uniform())
    model, record = pruned(recipe)
    folder, eighth = report(model, recipe, [record]).shape, report(model, recipe, [record], format=GGUF("q8_0")).shape
    assert folder is not None
    assert eighth is not None
    assert folder.before == eighth.before
    assert folder.pruned == record.size["after"]
    assert eighth.pruned is not None
    assert eighth.pruned.bytes == GGUF("q8_0").bytes(ExportPlan.of(model)) < folder.pruned.bytes / 3  # of float32


def test_a_model_that_was_shrunk_before_is_not_called_dense() -> None:
    first, second = Recipe(MLPWidth(multiple=8), 0.3, Uniform()), Recipe(MLPWidth(multiple=8), 0.6, Uniform())
    other = Recipe(HeadGroups(), 0.5, Uniform())
    model, record = pruned(first)
    shape = report(model, first, [record]).shape
    assert shape is not None
    assert shape.reference == "dense"
    for recipe in (second, other):
        batches = [{"input_ids": torch.arange(1, 17)[None]}]
        record = cut(model, CutInputs(recipe, batches, {"num_samples": 1}, None, CPU))
        found = report(model, recipe, [record])
        assert found.shape is not None
        assert found.shape.reference == next(iter(found.perplexity)) == "before"


def test_two_cuts_are_compared_with_the_model_before_the_first() -> None:
    recipe = Recipe(MLPWidth(multiple=8), 0.5, Uniform())
    model, record = pruned(recipe)
    sizes = [
        ModelSize(10 - part, 40 - part, Speed(speed, 2 * speed, "CPU, 2 threads"))
        for part, speed in enumerate((2.0, 3.0, 6.0, 8.0))
    ]
    records = [replace(record, step=step, size={"before": sizes[step], "after": sizes[step + 1]}) for step in (0, 2)]
    shape = report(model, recipe, records).shape
    assert shape is not None
    assert shape.pruned == sizes[3]
    assert shape.before is not None
    assert shape.before.speed is not None
    assert (shape.before.parameters, shape.before.bytes) == (10, 40)
    assert (shape.before.speed.prefill, shape.before.speed.decode) == pytest.approx((4.0, 8.0))
    assert shape.before.speed.device == "CPU, 2 threads"
    records[0] = replace(records[0], size={"before": sizes[0], "after": replace(sizes[1], speed=None)})
    unmeasured = report(model, recipe, records).shape
    assert unmeasured is not None
    assert unmeasured.before == replace(sizes[0], speed=None)


def test_a_model_that_was_sliced_before_and_masked_by_this_run() -> None:
    model, _ = pruned(Recipe(Slicing(), 0.25))
    found = report(model, RECIPE, [replace(CUT, recipe=recipe_record(RECIPE))])
    assert [structure.name for structure in found.structures] == ["slice"]
    assert found.shape is None
    assert list(found.perplexity) == ["before", "pruned", "recovered"]


@pytest.mark.parametrize(("recovery", "merged"), [(LoRA(r=2), False), (MaskedLoRA(r=2), True)])
def test_the_adapter_and_what_becomes_of_it(recovery: LoRA | MaskedLoRA, merged: bool) -> None:
    model, record = pruned()
    recovery.attach(model)
    found = report(model, RECIPE, [record])
    assert found.adapter is not None
    assert found.adapter["r"] == 2
    assert found.merged is merged
    assert found.adapter_parameters == sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert found.bytes == 4 * (found.parameters + (0 if merged else found.adapter_parameters))


def test_a_training_of_a_pruned_model_that_cuts_nothing() -> None:
    model, record = pruned()
    baseline = replace(measure_baseline(model, None, CPU), perplexity={"before": 30.0})
    found = report(model, None, [], baseline)
    assert found.perplexity == {"before": 30.0, "after": None}
    assert found.recipe == record.recipe
    assert (found.sparsity.requested, found.sparsity.before, found.sparsity.achieved_linears) == (0.5, 0.5, 0.5)
    assert found.baseline == baseline.record
    assert found.achieved == baseline.achieved
    assert found.scores is found.shape is None


def test_a_training_of_a_dense_model() -> None:
    model = small_model()
    found = report(model, None, [], measure_baseline(model, None, CPU))
    assert found.perplexity == {"after": None}
    assert (found.sparsity.requested, found.sparsity.achieved_linears) == (None, 0.0)
    assert found.baseline == {}
    assert found.recipe is None
    assert report(model, None, []).perplexity == {"after": None}
    assert report(model, None, [], trained=False).perplexity == {"exported": None}


def test_a_training_of_a_sliced_model() -> None:
    model, record = pruned(Recipe(Slicing(), 0.25))
    found = report(model, None, [], measure_baseline(model, None, CPU))
    assert found.shape is not None
    assert found.shape.requested == 0.25
    assert found.shape.before is None
    assert found.sparsity.requested is None
    assert found.recipe == record.recipe
