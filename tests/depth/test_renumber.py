"""Models without some of their blocks, against dense models that skip these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lit_prune.depth.renumber import check_renumbering, drop_blocks, renumbered
from lit_prune.errors import InputError
from lit_prune.models.families import blocks_path
from lit_prune.models.load import new_model
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.shrink import HeadGroups
from tests.conftest import FAMILIES, lively_model, multimodal_model, small_model
from tests.depth.skipping import skipping
from tests.shrink.given import Given

ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}

# Beside most families with an entry, those whose config has other fields by block.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES if family not in ("falcon", "falcon-new", "phi3", "mixtral")},
    "deepseek_v3": ("deepseek_v3", {"first_k_dense_replace": 2}),
    "ernie4_5_moe": ("ernie4_5_moe", {**ERNIE, "moe_layer_start_index": 2}),
    "ernie4_5_moe_dense_at_the_end": ("ernie4_5_moe", {**ERNIE, "moe_layer_start_index": 0, "moe_layer_end_index": 1}),
    "gpt_oss": ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "lfm2": ("lfm2", {"layer_types": ["full_attention", "conv", "conv"]}),
    "llama4": ("llama4_text", {"no_rope_layers": [1, 0, 1], "moe_layers": [0, 2]}),
    "qwen2_by_number": ("qwen2", {"layer_types": None, "max_window_layers": 1}),
    "qwen3_moe_by_step": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    "qwen3_next": ("qwen3_next", {"layer_types": ["full_attention", "full_attention", "linear_attention"]}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_rest_computes_as_if_the_block_were_skipped(case: str, batches: list[Tensor], tmp_path: Path) -> None:
    family, fields = CASES[case]
    model, dense = lively_model(family, **fields), lively_model(family, **fields)
    drop_blocks(model, blocks_path(model), (0, 2))
    with skipping(dense, {1}):
        expected = dense(batches[0], use_cache=False).logits
    torch.testing.assert_close(model(batches[0]).logits, expected, rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is type(dense)
    assert opened.config.num_hidden_layers == 2
    torch.testing.assert_close(opened(batches[0]).logits, expected, rtol=1e-5, atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(batches[0][:1], use_cache=True, **options)
    assert with_cache.tolist() == opened.generate(batches[0][:1], use_cache=False, **options).tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "smollm3"])
def test_the_first_blocks_go(family: str, batches: list[Tensor]) -> None:
    model, dense = lively_model(family), lively_model(family)
    drop_blocks(model, blocks_path(model), (2,))
    with skipping(dense, {0, 1}):
        expected = dense(batches[0], use_cache=False).logits
    torch.testing.assert_close(model(batches[0]).logits, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_language_model_with_a_vision_tower(batches: list[Tensor]) -> None:
    model, dense = multimodal_model(), multimodal_model()
    path = blocks_path(model)
    drop_blocks(model, path, (0, 2))
    assert model.config.text_config.num_hidden_layers == 2
    assert model.config.text_config.layer_types == ["sliding_attention", "sliding_attention"]
    dense.get_submodule(path)[1].register_forward_hook(lambda _module, args, _output: args[0])  # type: ignore[index]
    torch.testing.assert_close(model(batches[0]).logits, dense(batches[0], use_cache=False).logits)
    assert len(model.model.vision_tower.encoder.layers) == 3


def test_numbers_of_heads_that_become_equal_but_cannot_be_those_of_all(batches: list[Tensor]) -> None:
    """Three heads do not divide 32 dimensions, so that the blocks keep a class of their own."""
    model = lively_model("llama", num_key_value_heads=4)
    prune(model, batches, Recipe(HeadGroups(), 1 / 6, Given((0.25, 0.25, 0.0))))
    assert model.config.block_sizes["num_attention_heads"] == [3, 3, 4]
    drop_blocks(model, "model.layers", (0, 1))
    assert type(model).__name__ == "ShrunkLlamaForCausalLM"
    assert model.config.block_sizes["num_attention_heads"] == [3, 3]
    opened = new_model(model.config.to_dict())
    opened.load_state_dict(model.state_dict())
    assert torch.equal(opened.eval()(batches[0]).logits, model(batches[0]).logits)


def test_fields_of_the_config() -> None:
    config = PreTrainedConfig(
        num_hidden_layers=6,
        layer_types=["full_attention", "sliding_attention", "conv", "full_attention", "conv", "conv"],
        mlp_only_layers=[0, 2, 4],
        first_k_dense_replace=3,
        max_window_layers=8,
        num_kv_shared_layers=2,
        eos_token_id=[1, 2, 3, 4, 5, 6],
    )
    assert renumbered(config, [0, 2, 3, 4]) == {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "conv", "full_attention", "conv"],
        "mlp_only_layers": [0, 1, 3],
        "first_k_dense_replace": 2,
        "max_window_layers": 6,
        "num_kv_shared_layers": 1,
    }


def test_a_mixture_in_every_second_block() -> None:
    config = PreTrainedConfig(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1])
    changed = renumbered(config, [1, 2, 3, 5])
    assert changed == {"num_hidden_layers": 4, "mlp_only_layers": [0, 1], "decoder_sparse_step": 1}


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"attn.scaling of block 1 depends on its number"),
        ("gemma3n_text", {}, "depends on the number of blocks"),
        ("gemma4_text", {}, "depends on the number of blocks"),
        ("ernie4_5_moe", {**ERNIE, "moe_layer_start_index": 1, "moe_layer_interval": 2}, "would have other weights"),
        (
            "jamba",
            {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
            "would have other weights",
        ),
    ],
)
def test_families_that_cannot_lose_blocks(family: str, fields: dict[str, Any], reason: str) -> None:
    model = small_model(family, **fields)
    with pytest.raises(
        InputError, match=f"`pruning.method` Depth cannot remove blocks of the family '{family}': .*{reason}"
    ):
        check_renumbering(model, "transformer.h" if family == "gpt2" else "model.layers")
    assert model.config.num_hidden_layers == 3
