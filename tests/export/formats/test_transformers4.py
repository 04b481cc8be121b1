"""Both transformers 4 and 5 read an exported config; benchmarks/readers.py opens folders in either."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune.export.formats.transformers4 import add_earlier_names, with_earlier_names
from lit_prune.models.load import load_tokenizer
from tests.conftest import export, small_model

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
BY_LAYER_TYPE = {"full_attention": LINEAR | {"rope_theta": 7e4}, "sliding_attention": PLAIN}


@pytest.mark.parametrize(
    ("family", "rope", "fields"),
    [
        ("llama", PLAIN, {"rope_theta": 5e5}),
        ("llama", LINEAR | {"rope_theta": 7e4}, {"rope_theta": 7e4, "rope_scaling": LINEAR}),
        ("llama", LLAMA3 | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        ("phi", PLAIN | {"partial_rotary_factor": 0.75}, {"rope_theta": 5e5, "partial_rotary_factor": 0.75}),
        ("gpt_neox", PLAIN | {"partial_rotary_factor": 0.5}, {"rotary_emb_base": 5e5, "rotary_pct": 0.5}),
        ("gemma3_text", BY_LAYER_TYPE, {"rope_theta": 7e4, "rope_scaling": LINEAR, "rope_local_base_freq": 5e5}),
    ],
)
def test_rotary_settings_have_the_names_of_transformers_4_and_mean_the_same_in_5(
    family: str, rope: dict[str, Any], fields: dict[str, Any], batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model = small_model(family, rope_parameters=rope)
    export(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in fields} == fields
    assert ("rope_scaling" in config) is ("rope_scaling" in fields)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(opened(batches[0]).logits, model(batches[0]).logits)


def test_what_has_no_rotary_settings_or_only_new_ones_stays_as_it_is() -> None:
    for config in ({"model_type": "gpt2"}, {"model_type": "gemma4_text", "rope_parameters": BY_LAYER_TYPE}):
        assert with_earlier_names(config) == config


def test_the_language_model_of_a_multimodal_one_and_the_number_of_experts() -> None:
    config = {"text_config": {"model_type": "qwen3_moe", "rope_parameters": PLAIN, "num_local_experts": 4}}
    text = with_earlier_names(config)["text_config"]
    assert (text["rope_theta"], text["num_experts"]) == (5e5, 4)


def test_a_tokenizer_has_a_class_that_both_know(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("embedded")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    add_earlier_names(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|user|>"]
    assert "extra_special_tokens" not in config
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened.all_special_tokens == tokenizer.all_special_tokens
    text = "Hello<|user|> there"
    assert opened(text).input_ids == tokenizer(text).input_ids
