"""Small models built from configs, and text, for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may look for a hub

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import PreTrainedModel

from lit_prune.export.formats import HuggingFace
from lit_prune.export.plan import ExportPlan
from lit_prune.models.families import Block, blocks_path
from lit_prune.models.linears import ExpertSlice
from lit_prune.models.load import load_model, new_model

settings.register_profile("lit_prune", deadline=None, derandomize=True, database=None)
settings.load_profile("lit_prune")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Beside SMALL, for linears of sizes that an export in 4 bits may have.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "n_inner": 128, "head_dim": 16}
# One entry a case: what it says beside SMALL; `model_type` where the name of the case is another.
FAMILIES: dict[str, dict[str, Any]] = {
    "falcon": {"ffn_hidden_size": 48},  # attention and MLP in parallel on one input, blocks that return tuples
    "falcon-new": {  # two norms, so that attention and MLP see different inputs
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 48,
    },
    "falcon-alibi": {  # a positional argument, alibi, that hangs on the mask
        "model_type": "falcon",
        "alibi": True,
        "parallel_attn": False,
        "multi_query": False,
        "bias": True,
        "ffn_hidden_size": 48,
    },
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},  # window and full by turns
    "gemma3_text": {  # masks and rotary embeddings both differ by layer type
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {"n_inner": 48},  # weights stored (in, out); q, k and v are one matrix
    "gpt_neox": {},  # attention and MLP in parallel on two norms
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # the MLP is given (batch * tokens, in)
    "phi": {},  # q, k, v and fc1 share one input
    "phi3": {},  # q, k and v are one matrix, gate and up another
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {  # the middle block is not a mixture, and of another size
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
BY_TURNS: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
DELTA_NET: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
# The same for families without an entry in lit_prune.models.families, whose blocks are found by themselves.
WITHOUT_ENTRY: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4, "n_layer": 3},
    "cohere2": BY_TURNS,
    "deepseek_v2": {**LATENT, **ROUTED, "q_lora_rank": None, "first_k_dense_replace": 1},
    "deepseek_v3": {**LATENT, **ROUTED, "q_lora_rank": 16, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "falcon_h1": {  # attention and Mamba-2 in parallel
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "head_dim": 8,
    },
    "gemma": {"head_dim": 8},
    "gemma3n_text": {  # several copies of the stream: (copies, batch, tokens, hidden)
        **BY_TURNS,
        "head_dim": 8,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 3,
        "intermediate_size": [48] * 3,
    },
    "gemma4_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "head_dim": 8,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt_bigcode": {"n_inner": 48},
    "gpt_oss": {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # biases
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "granite": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "llama4_text": {  # every expert is given all tokens
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 1,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "ministral": {"head_dim": 8, "sliding_window": 8},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64},
    "olmo2": {},
    "olmo3": BY_TURNS,
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # a router that is an nn.Linear
    "qwen2_moe": {**MIXTURE, "shared_expert_intermediate_size": 24},
    "qwen3_5_text": DELTA_NET,
    "qwen3_next": {**MIXTURE, **DELTA_NET, "shared_expert_intermediate_size": 24},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}


def small_model(family: str = "llama", **fields: object) -> PreTrainedModel:
    """A fresh model of three blocks whose weights differ from block to block."""
    torch.manual_seed(0)
    described = FAMILIES.get(family) or WITHOUT_ENTRY.get(family) or {}
    model = new_model({"model_type": family, **SMALL, **described, **fields}).eval()
    for index, layer in enumerate(blocks_of(model)):
        for parameter in layer.parameters():
            parameter.data.mul_(1 + index)
    return model


def multimodal_model(**vision: object) -> PreTrainedModel:
    """A Gemma 3 with a vision tower of as many blocks as the language model has, which has no mixture of experts."""
    torch.manual_seed(0)
    tower = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48, **vision}
    fields: dict[str, Any] = {
        "text_config": {**SMALL, **FAMILIES["gemma3_text"]},
        "vision_config": {"image_size": 28, "patch_size": 14, **tower},
        "mm_tokens_per_image": 4,
    }
    return new_model({"model_type": "gemma3", **fields}).eval()


def lively_model(family: str, **fields: object) -> PreTrainedModel:
    """The same with norms and biases that do something, and weights large enough for tokens to differ."""
    model = small_model(family, **fields)
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.1 + around
        else:
            parameter.data.mul_(10 if family == "opt" else 3)  # OPT's positions drown its tokens otherwise
    return model


def blocks_of(model: PreTrainedModel) -> Iterable[nn.Module]:
    return model.get_submodule(blocks_path(model)).children()


def export(model: PreTrainedModel, folder: Path) -> ExportPlan:
    """Writes the Hugging Face folder of a model; returns the plan that was written."""
    plan = ExportPlan.of(model)
    HuggingFace().write(plan, folder)
    return plan


@torch.no_grad()
def inputs_by_linear(model: PreTrainedModel, block: Block, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of every linear of a block in plain forwards, (tokens, in); those of experts token by token."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in block.linears}

    def see_experts(experts: nn.Module, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        for x_I, choice_K in zip(args[0], args[1], strict=True):
            for expert in choice_K.tolist():
                gate, up = (experts.gate_up_proj[expert] @ x_I).chunk(2)
                seen[f"mlp.experts.{expert}.gate_up_proj"].append(x_I[None])
                seen[f"mlp.experts.{expert}.down_proj"].append((experts.act_fn(gate) * up)[None])

    hooks = []
    for name, linear in block.linears.items():
        if isinstance(linear, ExpertSlice):
            continue
        hooks.append(
            linear.module.register_forward_pre_hook(
                lambda _module, args, name=name: seen[name].append(args[0].flatten(0, -2))
            )
        )
    for experts in {linear.module for linear in block.linears.values() if isinstance(linear, ExpertSlice)}:
        hooks.append(experts.register_forward_pre_hook(see_experts))
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.fixture(params=FAMILIES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return small_model(request.param)


@pytest.fixture
def model() -> PreTrainedModel:
    return small_model()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(1)).split(2))


@pytest.fixture
def embedded() -> PreTrainedModel:
    return load_model("embedded", "float32")
