"""A model whose blocks differ in size is an ordinary Hugging Face folder, and opens with and without this package."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from lit_prune.models.remote_code.modeling_shrunk import FAMILIES, SHRUNK, LayerConfig, ShrunkCausalLM, decoder_layers
from tests.conftest import FAMILIES as CASES
from tests.conftest import SMALL, WITHOUT_ENTRY, lively_model

IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(3))
WIDTH = {"gpt2": "n_inner", "opt": "ffn_dim"}
HEADS = {"num_attention_heads": [2, 4, 2], "num_key_value_heads": [1, 2, 1]}
WITH_HEADS = sorted({*SHRUNK} - {"gpt2", "gpt_neox", "opt", "olmo2", "olmo3", "stablelm"})


def shrunk_model(family: str = "llama", sizes: dict[str, list[int]] | None = None) -> PreTrainedModel:
    sizes = {WIDTH.get(family, "intermediate_size"): [8, 40, 24]} if sizes is None else sizes
    fields = {**SMALL, "head_dim": 8, **(CASES.get(family) or WITHOUT_ENTRY.get(family) or {})}
    config = AutoConfig.for_model(f"shrunk_{family}", **fields, block_sizes=sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def total_of(model: PreTrainedModel) -> float:
    return float(model(IDS).logits.double().abs().sum())


def generated(model: PreTrainedModel) -> list[list[int]]:
    return model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None).tolist()  # type: ignore[operator]


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    sizes = {WIDTH.get(family, "intermediate_size"): [8, 40, 24], **(HEADS if family in WITH_HEADS else {})}
    model = shrunk_model(family, sizes)
    assert type(model) is SHRUNK[family]
    model.save_pretrained(tmp_path / "one")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(opened) is SHRUNK[family]
    assert opened.config.block_sizes == sizes
    assert torch.equal(opened(IDS).logits, model(IDS).logits)
    assert generated(opened) == generated(model)
    opened.save_pretrained(tmp_path / "two")
    for file in ("config.json", "modeling_shrunk.py"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()


@pytest.mark.parametrize("family", WITH_HEADS)
def test_a_cache_changes_nothing(family: str) -> None:
    model = shrunk_model(family, HEADS)
    cache = DynamicCache(config=model.config)
    first = model(IDS[:, :7], past_key_values=cache, use_cache=True).logits
    rest = [model(IDS[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(7, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), model(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_a_static_cache_holds_layers_of_different_sizes() -> None:
    model = shrunk_model(sizes=HEADS)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **settings)  # type: ignore[operator]
    assert static.tolist() == model.generate(IDS, **settings).tolist()  # type: ignore[operator]


def test_what_the_folder_says(tmp_path: Path) -> None:
    shrunk_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "shrunk_llama"
    assert config["architectures"] == ["ShrunkLlamaForCausalLM"]
    assert config["block_sizes"] == {"intermediate_size": [8, 40, 24]}
    assert config["intermediate_size"] == 48
    assert config["auto_map"] == {
        "AutoConfig": "modeling_shrunk.ShrunkLlamaConfig",
        "AutoModelForCausalLM": "modeling_shrunk.ShrunkLlamaForCausalLM",
    }


def test_the_folder_opens_without_lit_prune(tmp_path: Path) -> None:
    model = shrunk_model(sizes={"intermediate_size": [8, 40, 24], **HEADS})
    model.save_pretrained(tmp_path / "folder")
    program = f"""
import sys
sys.modules["lit_prune"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "folder")!r}, trust_remote_code=True)
ids = torch.tensor({IDS.tolist()})
print(float(model(ids).logits.detach().double().abs().sum()))
print(model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None).tolist())
model.save_pretrained({str(tmp_path / "again")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    total, text = done.stdout.strip().splitlines()
    assert float(total) == pytest.approx(total_of(model), rel=1e-5)
    assert json.loads(text) == generated(model)
    assert (tmp_path / "again" / "modeling_shrunk.py").is_file()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = shrunk_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_another_attention_is_that_of_every_layer() -> None:
    model = shrunk_model(sizes=HEADS)
    before = model(IDS).logits
    model.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in decoder_layers(model)} == {"eager"}
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_a_new_model_has_the_initial_weights_of_its_family() -> None:
    model = shrunk_model()
    assert float(model.model.layers[1].mlp.up_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_a_layer_config_is_the_shared_one_but_for_its_sizes() -> None:
    config = lively_model("llama").config
    layer = LayerConfig(config, {"intermediate_size": 8})
    config.attention_dropout = 0.5
    assert [layer.intermediate_size, layer.attention_dropout] == [8, 0.5]
    assert copy.deepcopy(layer).intermediate_size == 8
    assert not hasattr(layer, "nothing")


def test_a_wrong_number_of_sizes() -> None:
    with pytest.raises(ValueError, match="`block_sizes` must have 3 values of intermediate_size"):
        shrunk_model(sizes={"intermediate_size": [8, 8]})


def test_families_are_mixed_in() -> None:
    assert all(issubclass(kind, ShrunkCausalLM) for kind in SHRUNK.values())


def test_the_blocks_as_vllm_reads_them(tmp_path: Path) -> None:
    """vLLM's DeciLM takes the width of an MLP as it is, unless there is an ffn_mult, which it would round to 256."""
    model = shrunk_model()
    model.save_pretrained(tmp_path)
    blocks = AutoConfig.from_pretrained(tmp_path).block_configs
    assert [block.ffn.intermediate_size for block in blocks] == [8, 40, 24]
    for block, layer in zip(blocks, decoder_layers(model), strict=True):
        assert (block.attention.no_op, block.ffn.no_op, hasattr(block.ffn, "ffn_mult")) == (False, False, False)
        groups = model.config.num_attention_heads // block.attention.n_heads_in_group
        assert layer.self_attn.k_proj.out_features == groups * model.config.head_dim  # type: ignore[union-attr]
        assert layer.mlp.gate_proj.out_features == block.ffn.intermediate_size  # type: ignore[union-attr]
    assert "block_configs" not in json.loads((tmp_path / "config.json").read_text())


def test_different_heads_are_nothing_for_vllm() -> None:
    with pytest.raises(AttributeError, match="must have the same num_attention_heads, num_key_value_heads for vLLM"):
        _ = shrunk_model(sizes=HEADS).config.block_configs
    assert not hasattr(shrunk_model("qwen3").config, "block_configs")
