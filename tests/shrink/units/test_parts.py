"""The linears and the rows of the parts, by family."""

from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedConfig

from lit_prune.models.families import find_blocks
from lit_prune.shrink.units.parts import NoPart, Part, groups_of, mlp_of
from tests.conftest import small_model


def part(find: object, family: str, **fields: object) -> Part:
    model = small_model(family, **fields)
    return find(find_blocks(model)[0].linears, model.config)  # type: ignore[operator]


MLPS = {
    "llama": (["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj", "intermediate_size"),
    "phi3": (["mlp.gate_up_proj"], "mlp.down_proj", "intermediate_size"),
    "gpt_neox": (["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h", "intermediate_size"),
    "gpt2": (["mlp.c_fc"], "mlp.c_proj", "n_inner"),
    "opt": (["fc1"], "fc2", "ffn_dim"),
    "falcon": (["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h", "ffn_hidden_size"),
}


@pytest.mark.parametrize("family", MLPS)
def test_channels(family: str) -> None:
    readers, writer, field = MLPS[family]
    found = part(mlp_of, family)
    assert [list(found.rows), found.writer, dict(found.fields)] == [readers, writer, {field: 1}]
    assert found.units == 48
    assert found.columns_UK.tolist() == [[channel] for channel in range(48)]


def test_a_field_of_the_class_is_preferred_to_others_of_a_config() -> None:
    assert list(part(mlp_of, "llama", ffn_dim=48).fields) == ["intermediate_size"]
    linears = find_blocks(small_model("llama"))[0].linears
    for field in ("intermediate_size", "ffn_dim"):
        assert list(mlp_of(linears, SimpleNamespace(**{field: 48})).fields) == [field]
    with pytest.raises(NoPart, match="no field with the 48 channels"):
        mlp_of(linears, SimpleNamespace(ffn_dim=47))


def test_a_channel_of_a_fused_linear_is_a_row_of_each_half() -> None:
    assert part(mlp_of, "phi3").rows["mlp.gate_up_proj"][5].tolist() == [5, 53]


def test_groups() -> None:
    """Four heads of 8 in two groups: the second group has the last two heads, and the second key and value."""
    found = part(groups_of, "llama")
    assert found.units == 2
    assert found.writer == "self_attn.o_proj"
    assert found.columns_UK[1].tolist() == list(range(16, 32))
    assert found.rows["self_attn.q_proj"][1].tolist() == list(range(16, 32))
    assert found.rows["self_attn.v_proj"][1].tolist() == list(range(8, 16))
    assert found.sizes(1) == {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def test_a_group_of_a_fused_linear() -> None:
    rows_R = part(groups_of, "phi3").rows["self_attn.qkv_proj"][1]
    assert rows_R.tolist() == [*range(16, 32), *range(40, 48), *range(56, 64)]


def test_a_head_is_a_group_without_grouped_queries() -> None:
    found = part(groups_of, "llama", num_key_value_heads=4)
    assert found.units == 4
    assert torch.equal(found.columns_UK, torch.arange(32).view(4, 8))


def test_among_fields_of_custom_code_one_with_the_width_comes_first() -> None:
    linears = find_blocks(small_model("llama", intermediate_size=48))[0].linears
    undeclared = PreTrainedConfig(n_inner=None, intermediate_size=48)
    found = mlp_of(linears, undeclared)
    assert list(found.fields) == ["intermediate_size"]


@pytest.mark.parametrize(
    ("find", "family", "reason"),
    [
        (mlp_of, "mixtral", "mixtures of experts"),
        (mlp_of, "qwen2_moe", "mixtures of experts"),
        (mlp_of, "mamba2", "no MLP of a known layout"),
        (mlp_of, "bloom", "no field with the 128 channels"),
        (groups_of, "gpt2", "no field for the width of a head: the heads always fill the hidden size"),
        (groups_of, "falcon", "no field for the width of a head"),
        (groups_of, "deepseek_v2", "no attention of a known layout"),
    ],
)
def test_what_is_no_part(find: object, family: str, reason: str) -> None:
    with pytest.raises(NoPart, match=reason):
        part(find, family)


def test_shared_keys_and_values() -> None:
    model = small_model("llama")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(NoPart, match="share keys and values"):
        groups_of(find_blocks(model)[0].linears, model.config)
