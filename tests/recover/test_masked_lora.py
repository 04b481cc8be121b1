"""MaskedLoRA: the adapter alone is trained, and is merged without filling a zero."""

import torch
from transformers import PreTrainedModel

from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import MaskedLoRA, adapter_config
from lit_prune.recover.adapter import has_masked_adapter
from lit_prune.slice import Slicing
from tests.conftest import small_model


def trained(model: PreTrainedModel, batches: list[torch.Tensor]) -> PreTrainedModel:
    prune(model, batches, Recipe(sparsity=0.5))
    MaskedLoRA(r=4, target_modules=["up_proj"]).attach(model)
    given = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(given, lr=1e-2)
    for _ in range(3):
        model(batches[0], labels=batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_adapter_alone_is_trained(model: PreTrainedModel) -> None:
    MaskedLoRA(r=4, target_modules=["up_proj"]).attach(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 3 * 2
    assert all(".up_proj.lora_" in name for name in names)


def test_a_trained_adapter_is_merged_and_every_zero_stays(batches: list[torch.Tensor]) -> None:
    pruned, model = small_model(), trained(small_model(), batches)
    prune(pruned, batches, Recipe(sparsity=0.5))
    expected = model.eval()(batches[0]).logits
    MaskedLoRA(r=4, target_modules=["up_proj"]).detach(model)
    assert adapter_config(model) is None
    torch.testing.assert_close(model(batches[0]).logits, expected, rtol=1e-4, atol=1e-6)
    before, after = (m.model.layers[0].mlp.up_proj.weight for m in (pruned, model))
    assert torch.equal(after == 0, before == 0)
    assert (after != before).float().mean() > 0.4  # all that are not pruned, half of them


def test_a_model_can_be_cut_again_once_the_adapter_is_merged(batches: list[torch.Tensor]) -> None:
    model = trained(small_model(), batches)
    MaskedLoRA().detach(model)
    assert abs(prune(model, batches, Recipe(sparsity=0.7)).sparsity - 0.7) < 1e-3


def test_over_slices_it_is_the_adapter_of_lora_and_over_masks_it_is_not(batches: list[torch.Tensor]) -> None:
    model = small_model()
    prune(model, batches, Recipe(Slicing(), 0.25))
    MaskedLoRA().attach(model)
    assert adapter_config(model) is not None
    assert not has_masked_adapter(model)
    prune(masked := small_model(), batches, Recipe(Slicing(), 0.25))
    prune(masked, batches, Recipe())
    MaskedLoRA().attach(masked)
    assert has_masked_adapter(masked)
