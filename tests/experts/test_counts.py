"""The structure of a model with fewer experts."""

import json

import pytest
import torch
from torch import Tensor

from lit_prune.allocate import Uniform
from lit_prune.experts import Experts
from lit_prune.experts.counts import ExpertCounts
from lit_prune.models.structure import structures
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import Snapshot
from tests.experts.models import mixture_model


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe"])
def test_a_dense_model_is_rebuilt(family: str, batches: list[Tensor]) -> None:
    model, fresh = mixture_model(family), mixture_model(family)
    prune(model, batches, Recipe(Experts(multiple=2), 1 / 3, Uniform()))
    stored = json.loads(json.dumps(Snapshot.of(model).to_dict()))
    for _ in range(2):
        Snapshot.from_dict(stored).rebuild(fresh)
    assert structures(fresh) == structures(model)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(batches[0]).logits, model(batches[0]).logits)
    assert fresh.config.to_dict() == model.config.to_dict()


def test_a_model_that_was_cut_before_is_rebuilt_with_fewer(batches: list[Tensor]) -> None:
    model, first = mixture_model(), mixture_model()
    for cut in (model, first):
        prune(cut, batches, Recipe(Experts(), 1 / 3, Uniform()))
    prune(model, batches, Recipe(Experts(), 2 / 3, Uniform()))
    Snapshot.of(model).rebuild(first)
    first.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(first(batches[0]).logits, model(batches[0]).logits)


def test_description() -> None:
    described = ExpertCounts(4, 6, "model.layers").describe(mixture_model("qwen3_moe"))
    assert described.achieved == pytest.approx(1 / 3)
    assert described.outcome == "each of its 2 mixtures has 4 of its 6 experts."
    assert described.rows["experts of every mixture"] == "4 of 6, in 2 blocks"
    assert described.sizes == (4, 4)
