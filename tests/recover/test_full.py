"""FullFineTuning: all weights are trained but the pruned ones, and frozen parameters stay frozen."""

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning
from tests.conftest import small_model


def test_every_weight_moves_but_the_pruned_ones(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    prune(model, batches, Recipe(sparsity=0.5))
    FullFineTuning().attach(model)
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(batches[0], labels=batches[0]).loss.backward()
    optimizer.step()
    after = model.model.layers[1].mlp.up_proj.weight
    assert (before == 0).sum() > 600  # of 1536
    assert torch.equal(after == 0, before == 0)
    assert (after[before != 0] != before[before != 0]).all()


def test_what_was_frozen_stays_frozen() -> None:
    model = small_model()
    model.model.embed_tokens.requires_grad_(False)
    FullFineTuning().check(model)
    FullFineTuning().attach(model)
    assert not model.model.embed_tokens.weight.requires_grad


def test_a_model_that_is_frozen_as_a_whole_is_refused(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    with pytest.raises(InputError, match=r"must be a recovery that has something to train, got Full.*use MaskedLoRA"):
        FullFineTuning().check(model)
