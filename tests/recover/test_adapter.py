"""Adapters: checks of their settings, their config, and W + alpha / r * B A by hand."""

import json

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.recover import LoRA, MaskedLoRA, adapter_config, merged_weight
from lit_prune.recover.adapter import has_masked_adapter, merge_adapter

ADAPTERS: list[type[LoRA] | type[MaskedLoRA]] = [LoRA, MaskedLoRA]


def with_ones(model: PreTrainedModel, recovery: LoRA | MaskedLoRA) -> PreTrainedModel:
    """``model`` with weights of 1 but for a zero at [0, 0] of every q_proj, and an adapter whose A and B are 1."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.fill_(1).view(-1)[0] = 0
    recovery.attach(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.fill_(1)
    return model


@pytest.mark.parametrize(("leaf", "at_zero"), [(LoRA, 3.0), (MaskedLoRA, 0.0)])
def test_the_merged_weight_by_hand(leaf: type[LoRA], at_zero: float, model: PreTrainedModel) -> None:
    # alpha / r * B A: 3 / 2 * (1 * 1 + 1 * 1)
    with_ones(model, leaf(r=2, alpha=3, target_modules=["q_proj"]))
    assert has_masked_adapter(model) is (leaf is MaskedLoRA)
    merged = merged_weight(model.model.layers[0].self_attn.q_proj)
    assert merged[0, 0] == at_zero
    assert (merged.flatten()[1:] == 1 + 3).all()


@pytest.mark.parametrize("leaf", ADAPTERS)
def test_a_merged_adapter_is_gone_and_its_weights_stay(leaf: type[LoRA], model: PreTrainedModel) -> None:
    names, ids = list(model.state_dict()), torch.arange(1, 17)[None]
    with_ones(model, leaf(r=2, alpha=3, target_modules=["q_proj"]))
    expected = model(ids).logits
    merge_adapter(model)
    assert list(model.state_dict()) == names
    assert adapter_config(model) is None
    assert model.model.layers[2].self_attn.q_proj.weight[5, 7] == 4
    torch.testing.assert_close(model(ids).logits, expected)
    merge_adapter(model)  # without an adapter it does nothing
    assert list(model.state_dict()) == names


def test_the_config_can_be_stored_and_does_not_name_the_dense_model(model: PreTrainedModel) -> None:
    model.name_or_path = "dense"
    assert adapter_config(model) is None
    LoRA(r=3, alpha=5, dropout=0.1, target_modules=["q_proj", "up_proj"]).attach(model)
    config = adapter_config(model)
    assert config is not None
    assert json.loads(json.dumps(config)) == config
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.1)
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]
    assert config["base_model_name_or_path"] is None


@pytest.mark.parametrize("leaf", ADAPTERS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [({"r": 0}, "r` must be at least 1"), ({"dropout": 1.0}, r"dropout` must be in \[0, 1\)")],
)
def test_settings_out_of_range(leaf: type[LoRA], fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=f"`{leaf.__name__}.{message}"):
        leaf(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("leaf", ADAPTERS)
def test_target_modules_that_match_nothing(leaf: type[LoRA], model: PreTrainedModel) -> None:
    message = rf"`{leaf.__name__}.target_modules` must match .*, got 'none'; there are .*q_proj"
    with pytest.raises(InputError, match=message):
        leaf(target_modules=["q_proj", "none"]).check(model)
    leaf(target_modules=["q_proj"]).check(model)
