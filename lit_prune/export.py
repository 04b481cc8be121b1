"""An ordinary Hugging Face folder: pruned weights as they are, the adapter beside them, tokenizer, model card.

Where there is an adapter, its files lie at the root of the folder in peft's layout, so that a plain ``from_pretrained``
loads pruned weights and adapter together (where peft is installed). It is not merged: B A is dense and would fill
every zero.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.recover import adapter_config


def export(model: PreTrainedModel, folder: Path, tokenizer: Tokenizer | None = None, card: str | None = None) -> None:
    """Writes ``model`` into ``folder``, which plain ``transformers`` opens.

    Args:
        model: A causal LM, with or without a LoRA adapter; it is left as it is.
        folder: Made where it is missing.
        tokenizer: Saved beside the model.
        card: Text of the model card, README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if adapter_config(model) is not None:
        model.save_pretrained(folder)  # with an adapter on it, transformers saves the adapter alone
        _name_base(folder / "adapter_config.json")
    without_adapter(model).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model of the same weights without the adapter; the weights are shared, not copied."""
    if adapter_config(model) is None:
        return model
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    plain.load_state_dict(base_weights(model), strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def base_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the state dict of ``model`` as it would be without its adapter."""
    return {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }


def _name_base(adapter: Path) -> None:
    """Makes the folder that the adapter lies in its base."""
    config = json.loads(adapter.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "."
    adapter.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
