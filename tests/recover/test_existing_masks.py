"""Masks that a model came with: by its record, or by zeros that no record explains."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.masks.zeros import zero_shares
from lit_prune.models import structure
from lit_prune.models.families import FAMILIES
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, Recovery, adapter_config
from lit_prune.recover.existing_masks import attach, check_kept, check_unfilled, take_zeros
from tests.conftest import small_model


def pruned(batches: list[torch.Tensor]) -> PreTrainedModel:
    """A model of somebody else's: half of its weights are zero, and nothing says so."""
    model = small_model()
    prune(model, batches, Recipe(Magnitude(), 0.5))
    del model.config.lit_prune
    return model


@pytest.mark.parametrize("recovery", [MaskedLoRA(), FullFineTuning()])
def test_a_recovery_that_keeps_zeros_is_asked_nothing(recovery: Recovery, batches: list[torch.Tensor]) -> None:
    model = pruned(batches)
    take_zeros(model, None, recovery)
    assert model.config.lit_prune == {"masked": True}
    assert zero_shares(model)[1] == pytest.approx(0.5, abs=1e-3)


def test_the_zeros_of_a_family_that_is_not_known_are_asked_for(
    batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, model = small_model(), pruned(batches)
    monkeypatch.delitem(FAMILIES, "llama")
    for ambiguous in (dense, model):
        ambiguous.model.others = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    take_zeros(dense, None, LoRA())
    with pytest.raises(InputError, match="`pruning.keep_zeros` must be given: 49.9%"):
        take_zeros(model, None, LoRA())
    for keep, recovery in ((True, LoRA()), (None, MaskedLoRA())):
        with pytest.raises(InputError, match="`pruning.blocks` must be given for the family 'llama'"):
            take_zeros(model, keep, recovery)
    take_zeros(model, False, LoRA())
    assert not hasattr(model.config, "lit_prune")
    take_zeros(model, True, LoRA(), blocks="model.layers")
    assert model.config.lit_prune == {"recipe": {"blocks": "model.layers"}, "masked": True}


def test_a_dense_model_is_asked_nothing(model: PreTrainedModel) -> None:
    for keep in (None, False):
        take_zeros(model, keep, LoRA())
    assert not hasattr(model.config, "lit_prune")
    with pytest.raises(InputError, match="`pruning.keep_zeros` must be null for a model that has no zeros"):
        take_zeros(model, True, LoRA())


def test_another_adapter_than_the_folders_is_refused(model: PreTrainedModel) -> None:
    attach(model, LoRA(r=4, target_modules=["q_proj"]))
    for same in (LoRA(r=4), LoRA(r=4, target_modules=["q_proj"])):
        check_kept(model, same)
    for other in (
        LoRA(r=8),
        LoRA(r=4, alpha=8),
        LoRA(r=4, target_modules=["k_proj"]),
        MaskedLoRA(r=4),
        FullFineTuning(),
        None,
    ):
        if other is None:
            model.requires_grad_(False)  # as a folder with an adapter is loaded
        with pytest.raises(InputError, match=r"must be the adapter in the folder `model.pretrained`, LoRA\(r=4"):
            check_kept(model, other)


def test_zeros_that_training_would_fill_need_an_answer(batches: list[torch.Tensor]) -> None:
    with pytest.raises(InputError, match=r"`pruning.keep_zeros` must be given: 50.0% of the weights of the linears"):
        take_zeros(pruned(batches), None, LoRA())
    frozen = pruned(batches).requires_grad_(False)
    take_zeros(frozen, None, None)  # nothing is trained
    assert not structure.masked(frozen)
    with pytest.raises(InputError, match="`pruning.keep_zeros` must not be false with MaskedLoRA"):
        take_zeros(pruned(batches), False, MaskedLoRA())
    recorded = pruned(batches)
    structure.write(recorded, masked=True)
    with pytest.raises(InputError, match="must not be false for a model whose record says that its weights are masked"):
        take_zeros(recorded, False, LoRA())


def test_a_mask_that_training_would_fill_is_refused(batches: list[torch.Tensor]) -> None:
    model = pruned(batches)
    check_unfilled(model, "recovery", "LoRA")  # no mask, by its record
    structure.write(model, masked=True)
    with pytest.raises(InputError, match="`pruning.before` must be given for a model with masks, .*: use LoRA, or fre"):
        check_unfilled(model, "before", "LoRA")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    check_unfilled(model, "before", "LoRA")


def test_an_adapter_is_attached_once_and_then_trained_further(model: PreTrainedModel) -> None:
    attach(model, None)
    assert adapter_config(model) is None
    attach(model, LoRA(r=2))
    model.requires_grad_(False)
    attach(model, LoRA(r=2))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert structure.record(model)["recovery"].startswith("LoRA(r=2")
