"""A folder whose model, config and tokenizer are classes of its own files, as many models on the hub have them."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_prune.models.load import EMBEDDED

CONFIGURATION = """
from transformers import PreTrainedConfig

class OwnConfig(PreTrainedConfig):
    model_type = "own_llama"

    def __init__(self, intermediate_size=96, **fields):
        self.intermediate_size = intermediate_size
        super().__init__(**fields)
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def write_custom_model(folder: Path) -> None:
    """Writes a random Llama of two blocks as a family of its own, whose logits are half of those of a Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    _update(folder / "config.json", model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=CLASSES)
    tokenizer = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    _update(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizer)
    for name, text in {"configuration": CONFIGURATION, "modeling": MODELING, "tokenization": TOKENIZATION}.items():
        (folder / f"{name}_own.py").write_text(text)


def _update(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
