import pytest
import torch

from lit_prune.allocate import Uniform
from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import measure
from lit_prune.fit.baseline import measure_baseline
from lit_prune.models import structure
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA
from tests.conftest import small_model

CPU = torch.device("cpu")


def batches() -> list[Batch]:
    return [{"input_ids": torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(1))}]


def test_a_dense_model() -> None:
    model = small_model()
    found = measure_baseline(model, (batches(), "val"), CPU)
    measured = measure(model, batches(), "val")
    assert found.perplexity == {"before": pytest.approx(measured.perplexity)}
    assert found.protocol == measured.protocol
    assert list(found.seconds) == ["perplexity_before"]
    assert (found.step, found.record, found.achieved, found.sparsity) == (0, {}, [], 0.0)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_zeros_of_a_model_that_was_pruned_are_counted_by_block(adapter: bool) -> None:
    model = small_model()
    prune(model, batches(), Recipe(Magnitude(), 0.5, Uniform(), ignore=["down_proj"]))
    if adapter:
        LoRA().attach(model)
    found = measure_baseline(model, None, CPU)
    assert found.achieved == pytest.approx([0.5] * 3, abs=1e-3)
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    assert found.record == structure.record(model)
    assert found.record["masked"]


def test_without_validation_nothing_is_measured() -> None:
    found = measure_baseline(small_model(), None, CPU)
    assert (found.perplexity, found.protocol, found.seconds) == ({}, None, {})
