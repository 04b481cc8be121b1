"""Weights that a checkpoint leaves out, and their restoration."""

import io
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.checkpointing.weights import DroppedWeight, SourceWeights, restore_weights
from lit_prune.errors import InputError
from lit_prune.pipeline import prune
from lit_prune.pruning import MaskMethod, Method, Wanda
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, Snapshot
from tests.conftest import small_model


def leaves(kind: type) -> list[type]:
    return [leaf for sub in kind.__subclasses__() for leaf in (leaves(sub) or [sub])]


METHODS = [leaf for leaf in leaves(MaskMethod) if leaf.__module__.startswith("lit_prune.")]


def stored(model: PreTrainedModel, source: SourceWeights) -> tuple[dict[str, Any], dict[str, DroppedWeight]]:
    """The state dict and what stands for the weights that it leaves out, through a file."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    dropped = source.drop_from(state, model, "model.")
    buffer = io.BytesIO()
    torch.save((state, {name: weight.to_dict() for name, weight in dropped.items()}), buffer)
    buffer.seek(0)
    state, fields = torch.load(buffer, weights_only=True)
    return state, {name: DroppedWeight.from_dict(weight) for name, weight in fields.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2"])
def test_a_pruned_model_comes_back_to_the_bit(method: type[Method], family: str, batches: list[torch.Tensor]) -> None:
    model, chosen = small_model(family), method()
    source = SourceWeights.of(model)
    with source.through_cut(model, keeps_values=chosen.keeps_values):
        prune(model, batches, Recipe(chosen, 0.5))
    LoRA(r=2).attach(model)
    state, dropped = stored(model, source)
    pruned = [name for name in dropped if dropped[name].mask is not None]
    assert bool(pruned) is chosen.keeps_values
    assert all("base_layer" in name or "experts" in name for name in pruned)
    assert any("lora_A" in name for name in state)
    assert any("embed" in name or "wte" in name for name in dropped)
    assert not any("norm" in name or "ln_" in name for name in state)
    fresh = small_model(family)
    Snapshot.of(model).rebuild(fresh)
    restore_weights(state, fresh, "model.", dropped)
    want = model.state_dict()
    assert state.keys() == {f"model.{name}" for name in want}
    assert all(torch.equal(state[f"model.{name}"], want[name]) for name in want)
    again, dropped_again = stored(model, SourceWeights.resumed(dropped))  # what the run that goes on leaves out
    assert dropped_again.keys() == dropped.keys()
    assert all(dropped_again[name].digest == dropped[name].digest for name in dropped)
    assert again.keys() == {name for name in state if name.removeprefix("model.") not in dropped}


def test_what_is_trained_or_was_changed_is_stored(model: PreTrainedModel) -> None:
    source = SourceWeights.of(model)
    assert stored(model, source)[1] == {}
    model.requires_grad_(False)
    assert stored(model, source)[0] == {}
    weight = model.model.layers[1].mlp.up_proj.weight
    weight[0, 0] += 1
    assert stored(model, source)[0].keys() == {"model.model.layers.1.mlp.up_proj.weight"}


def test_two_cuts_of_frozen_weights_leave_one_mask(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    model.requires_grad_(False)
    source = SourceWeights.of(model)
    for sparsity in (0.3, 0.6):
        with source.through_cut(model, keeps_values=True):
            prune(model, batches, Recipe(Wanda(), sparsity))
    state, dropped = stored(model, source)
    assert state == {}
    assert sum(weight.mask is not None for weight in dropped.values()) == 21
    fresh = small_model()
    restore_weights(state, fresh, "model.", dropped)
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in model.state_dict().items())


def test_negative_zeros_are_not_left_to_a_mask(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    model.requires_grad_(False)
    weight = model.model.layers[0].mlp.up_proj.weight
    source = SourceWeights.of(model)
    with source.through_cut(model, keeps_values=True):
        prune(model, batches, Recipe(Wanda(), 0.5))
        weight[0, 0] = -0.0
    assert list(stored(model, source)[0]) == ["model.model.layers.0.mlp.up_proj.weight"]


def test_a_source_that_is_another_is_refused(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    state, dropped = stored(model, SourceWeights.of(model))
    other = small_model()
    other.model.norm.weight.data[3] += 1e-6
    message = (
        "`model.pretrained` must be the model that the checkpoint was made from; its weight model.norm.weight differs"
    )
    with pytest.raises(InputError, match=message):
        restore_weights(state, other, "model.", dropped)
    with pytest.raises(InputError, match=r"model.layers.3.* differs. .*`pruning.full_checkpoint`"):
        restore_weights(dict(other.state_dict()), small_model(num_hidden_layers=4), "", {})
