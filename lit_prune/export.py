"""An ordinary Hugging Face folder: the weights, an adapter that cannot be merged beside them, tokenizer, model card.

A masked adapter is merged always: the zeros stay, and plain peft would take it for one that is not masked. The adapter
of a model without masks is merged too. Plain LoRA over masks is not, since B A is dense and would fill every zero: its
files lie at the root of the folder in peft's layout, so that a plain ``from_pretrained`` loads pruned weights and
adapter together (where peft is installed).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.errors import InputError
from lit_prune.recover import adapter_config, merged_weight, snapshot


def export(
    model: PreTrainedModel, folder: Path, tokenizer: Tokenizer | None = None, card: str | None = None
) -> PreTrainedModel:
    """Writes ``model`` into ``folder``, which plain ``transformers`` opens; returns the model whose weights are there.

    Args:
        model: A causal LM, with or without a LoRA adapter; it is left as it is.
        folder: Made where it is missing.
        tokenizer: Saved beside the model.
        card: Text of the model card, README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if adapter_config(model) is not None and not merges(model):
        model.save_pretrained(folder)  # with an adapter on it, transformers saves the adapter alone
        _name_base(folder / "adapter_config.json")
    plain = merged(model) if merges(model) else without_adapter(model)
    plain.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return plain


def merges(model: PreTrainedModel) -> bool:
    """Returns whether the adapter on ``model`` is merged when that is exported: wherever that fills no zeros."""
    return _mergeable(snapshot(model))


def _mergeable(stored: dict[str, Any]) -> bool:
    fills = stored["record"].get("masked") and not stored.get("masked_adapter")
    return stored["adapter"] is not None and not fills


def check_merge(stored: dict[str, Any]) -> None:
    """Asks whether a model has no adapter, or one that can be merged.

    Args:
        stored: The model's snapshot, such as a checkpoint has.

    Raises:
        InputError: if the adapter would fill zeros.
    """
    if stored["adapter"] is not None and not _mergeable(stored):
        raise InputError(
            "`merge` must be left out for LoRA over masks, whose B A is dense and would fill every zero: export the "
            "adapter beside the weights, or train with `--pruning.recovery MaskedLoRA`."
        )


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model without the adapter, whose weights have it merged in; ``model`` is left as it is.

    Weights without an adapter are shared.
    """
    plain = without_adapter(model)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            plain.get_submodule(name).weight = nn.Parameter(merged_weight(layer))
    return plain


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
