"""Quantisation of a pruned model: the linears of its blocks, each with its mask."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.models.quantised import Quantization, quantisation, quantised


def quantise(model: PreTrainedModel, quantization: Quantization, double_quant: bool) -> None:
    """Quantises the linears of the blocks of ``model`` to 4 or 8 bits, in place; embeddings and head stay as they are.

    In a masked model every linear stores its mask, because quantisation rounds further weights to zero.
    """
    masked = structure.masked(model)
    blocks_path = structure.record(model).get("recipe", {}).get("blocks")
    for block in find_blocks(model, blocks=blocks_path):
        for name, linear in block.linears.items():
            module: Any = linear.module
            model.set_submodule(f"{block.path}.{name}", quantised(module, quantization, double_quant, masked=masked))
    mark_quantised(model)


def mark_quantised(model: PreTrainedModel) -> None:
    """Sets the attributes of ``model`` by which peft and transformers recognise quantised models."""
    kind = quantisation(model)
    model.is_loaded_in_8bit = kind is not None and kind["quantization"] == "int8"  # type: ignore[assignment]
    model.is_loaded_in_4bit = kind is not None and kind["quantization"] != "int8"  # type: ignore[assignment]
