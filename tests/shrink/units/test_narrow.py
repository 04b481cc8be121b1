"""Smaller blocks compute what the full ones compute without the units, and know their sizes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_prune.models.families import custom_class, find_blocks
from lit_prune.models.remote_code.modeling_shrunk import LayerConfig
from lit_prune.shrink.units.narrow import adopt_sizes, check_part, config_error, narrow, set_sizes
from lit_prune.shrink.units.parts import NoPart, groups_of, mlp_of
from tests.conftest import FAMILIES, WITHOUT_ENTRY, lively_model, small_model

IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(3))
FINDERS = {"mlp": mlp_of, "groups": groups_of}
REFUSED = {
    "mlp": {"mixtral", "qwen3_moe"},
    "groups": {"falcon", "falcon-new", "falcon-alibi", "gpt2", "gpt_neox", "opt"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", FINDERS)
def test_removed_units_are_as_if_their_columns_were_zero(kind: str, family: str) -> None:
    model, find = lively_model(family), FINDERS[kind]
    block = find_blocks(model)[1]
    if family in REFUSED[kind]:
        block = find_blocks(model)[0]
        with pytest.raises(NoPart):
            check_part(block.module, find(block.linears, model.config), model.config, 0)
        return
    part = find(block.linears, model.config)
    check_part(block.module, part, model.config, 1)
    kept_U = torch.arange(part.units)[1::2]
    gone = [unit for unit in range(part.units) if unit not in kept_U.tolist()]
    block.linears[part.writer].weight_OI[:, part.columns_UK[gone].flatten()] = 0
    expected = model(IDS).logits
    narrow(block.module, part, kept_U)
    adopt_sizes(block.module, LayerConfig(model.config, part.sizes(len(kept_U))), 1)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert block.linears[part.writer].weight_OI.shape[1] == len(kept_U) * part.columns_UK.shape[1]


@pytest.mark.parametrize(
    ("kind", "family", "reason"),
    [
        ("groups", "opt", r"no place for the sizes of self_attn.k_proj.weight"),
        ("groups", "olmo2", r"no place for the sizes of self_attn.q_norm.weight"),
        ("groups", "gpt_oss", r"no place for the sizes of self_attn.sinks"),
    ],
)
def test_a_family_without_a_place_for_the_sizes(kind: str, family: str, reason: str) -> None:
    assert family in {**FAMILIES, **WITHOUT_ENTRY}
    model = small_model(family)
    block = find_blocks(model)[0]
    with pytest.raises(NoPart, match=reason):
        check_part(block.module, FINDERS[kind](block.linears, model.config), model.config, 0)


def test_a_block_that_is_not_as_its_config_says() -> None:
    model = small_model()
    block = find_blocks(model)[0]
    model.config.intermediate_size = 40
    part = mlp_of(block.linears, small_model().config)
    with pytest.raises(NoPart, match="do not have the shapes"):
        check_part(block.module, part, model.config, 0)


def test_blocks_that_cannot_be_built() -> None:
    model = small_model()
    block = find_blocks(model)[0]
    part = mlp_of(block.linears, model.config)
    model.config.hidden_act = "unknown"
    with pytest.raises(NoPart, match="cannot be built from their config"):
        check_part(block.module, part, model.config, 0)


@pytest.mark.parametrize("read", [False, True])
def test_the_class_and_the_config_follow_the_sizes(read: bool, tmp_path: Path) -> None:
    model = small_model()
    if read:  # its config has a `model_type` of its own beside that of its class
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    blocks = find_blocks(model)
    layers = [block.module for block in blocks]
    config, shared = model.config, layers[0].self_attn.config
    assert shared is config
    for units, block in zip((8, 16, 24), blocks, strict=True):
        narrow(block.module, mlp_of(block.linears, config), torch.arange(units))
    set_sizes(model, layers, {"intermediate_size": [8, 16, 24]})
    assert type(model).__name__ == "ShrunkLlamaForCausalLM"
    assert model.config is config
    assert config.model_type == "shrunk_llama"
    assert custom_class(config) == "shrunk"
    assert config.block_sizes == {"intermediate_size": [8, 16, 24]}
    assert config.intermediate_size == 48
    assert [layer.mlp.intermediate_size for layer in layers] == [8, 16, 24]
    for block in find_blocks(model):
        narrow(
            block.module,
            mlp_of(block.linears, LayerConfig(config, {"intermediate_size": (8, 16, 24)[block.index]})),
            torch.arange(8),
        )
    set_sizes(model, layers, {"intermediate_size": [8, 8, 8]})
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model.config).__name__ == "LlamaConfig"
    assert config.intermediate_size == 8
    assert not hasattr(config, "block_sizes")
    assert all(layer.self_attn.config is config for layer in layers)
    assert model.config.model_type == "llama"


def test_trained_parameters_stay_trained() -> None:
    model = small_model("phi")
    block = find_blocks(model)[0]
    block.module.mlp.fc1.requires_grad_(False)
    narrow(block.module, mlp_of(block.linears, model.config), torch.arange(8))
    assert {name: parameter.requires_grad for name, parameter in block.module.mlp.named_parameters()} == {
        "fc1.weight": False,
        "fc1.bias": False,
        "fc2.weight": True,
        "fc2.bias": True,
    }


def test_what_a_config_accepts() -> None:
    config = small_model("llama").config
    assert config_error(config, {"hidden_size": 24}) is None
    told = "The hidden size (30) is not a multiple of the number of attention heads (4)."
    assert config_error(config, {"hidden_size": 30}) == told
