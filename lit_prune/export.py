"""An ordinary Hugging Face folder: the weights, an adapter that cannot be merged beside them, tokenizer, model card.

A masked adapter is merged always: the zeros stay, and plain peft would take it for one that is not masked. The adapter
of a model without masks is merged too. Plain LoRA over masks is not, since B A is dense and would fill every zero: its
files lie at the root of the folder in peft's layout, so that a plain ``from_pretrained`` loads pruned weights and
adapter together (where peft is installed). A model that QLoRA quantised is written in the form that it was trained for.
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
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import InputError
from lit_prune.on_disk import save
from lit_prune.quantised import (
    bitsandbytes_config,
    check_zeros,
    dense,
    dequantised,
    is_quantised,
    quantisation,
    quantised_linears,
    shell,
    unquantised,
)
from lit_prune.recover import adapter_config, mark, merged_weight, quantise, snapshot


def export(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
    *,
    written: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Writes ``model`` into ``folder``, which plain ``transformers`` opens; returns the model whose weights are there.

    Args:
        model: A causal LM, with or without a LoRA adapter; it is left as it is.
        folder: Made where it is missing.
        tokenizer: Saved beside the model.
        card: Text of the model card, README.md.
        written: What :func:`exported` returns of ``model``, where that was asked already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if adapter_config(model) is not None and not merges(model):
        model.save_pretrained(folder)  # with an adapter on it, transformers saves the adapter alone
        _name_base(folder / "adapter_config.json")
    plain = written or exported(model)
    save(plain, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return plain


def exported(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model whose weights are exported for ``model``: without the adapter, merged or not, quantised or not.

    Raises:
        RuntimeError: if a weight that was pruned is not zero in it.
    """
    plain = merged(model) if merges(model) else without_adapter(model)
    if form(model) == "requantised":
        quantise(plain, **quantisation(model))  # type: ignore[arg-type]
        for name, module in list(quantised_linears(plain)):
            plain.set_submodule(name, shell(module))
        _tell_quantised(plain)
    _check_zeros(model, plain)
    return plain


def form(model: PreTrainedModel) -> str | None:
    """Returns in which form a quantised model is exported, as QLoRA calls it; None for one in full precision."""
    return _form(snapshot(model))


def _form(stored: dict[str, Any]) -> str | None:
    return stored["record"].get("form") if stored.get("quantised") and stored["adapter"] else None


def merges(model: PreTrainedModel) -> bool:
    """Returns whether the adapter on ``model`` is merged when that is exported: wherever that fills no zeros.

    Over quantised weights the form of the export decides.
    """
    return _mergeable(snapshot(model))


def _mergeable(stored: dict[str, Any]) -> bool:
    fills = stored["record"].get("masked") and not stored.get("masked_adapter")
    return stored["adapter"] is not None and not fills and _form(stored) != "adapter"


def check_merge(stored: dict[str, Any]) -> None:
    """Asks whether a model has no adapter, or one that can be merged.

    Args:
        stored: The model's snapshot, such as a checkpoint has.

    Raises:
        InputError: if the adapter would fill zeros, or was trained to stay beside quantised weights.
    """
    if stored["adapter"] is None or _mergeable(stored):
        return
    if _form(stored) == "adapter":
        raise InputError(
            "`merge` must be left out for an adapter that was trained to stay beside quantised weights: train with "
            "QLoRA, `--pruning.recovery.form merged` or `requantised`, on weights in full precision."
        )
    raise InputError(
        "`merge` must be left out for LoRA over masks, whose B A is dense and would fill every zero: export the "
        "adapter beside the weights, or train with `--pruning.recovery MaskedLoRA`."
    )


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model in full precision without the adapter, which is merged in; ``model`` is left as it is.

    Weights without an adapter are shared, unless they are quantised.
    """
    plain = without_adapter(model)
    for name, module in list(quantised_linears(plain)):
        plain.set_submodule(name, dense(module, dequantised(module)))
    _tell_quantised(plain)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight, linear = merged_weight(layer), plain.get_submodule(name)
            turned = is_quantised(layer.get_base_layer()) and isinstance(linear, Conv1D)
            linear.weight = nn.Parameter(weight.T.contiguous() if turned else weight)
    return plain


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model of the same weights without the adapter; the weights are shared, not copied."""
    if adapter_config(model) is None:
        return model
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(unquantised(model.config), dtype=model.dtype)
    packed = {name.replace(".base_layer", ""): module for name, module in quantised_linears(model)}
    for name, module in packed.items():
        plain.set_submodule(name, shell(module))
    within = tuple(f"{name}." for name in packed)
    told = plain.load_state_dict(base_weights(model, but=within), strict=False, assign=True)
    assert all(name.startswith(within) for name in (*told.missing_keys, *told.unexpected_keys)), told
    share_buffers(model, plain)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    _tell_quantised(plain)
    return plain


def share_buffers(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Gives ``plain`` the buffers of ``model`` that no state dict has, such as rotary frequencies, so that it runs."""
    for name, buffer in model.named_buffers():
        path, _, last = name.replace(".base_layer.", ".").rpartition(".")
        module = plain.get_submodule(path)
        if last in module._buffers and module._buffers[last].is_meta:  # type: ignore[union-attr]
            module._buffers[last] = buffer


def _tell_quantised(model: PreTrainedModel) -> None:
    """Has the config of ``model`` say how its linears are quantised, so that transformers opens them, or not."""
    mark(model)
    model.config = unquantised(model.config)
    if quantisation(model) is not None:
        model.config.quantization_config = bitsandbytes_config(model)


def _check_zeros(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Asks whether ``plain`` is zero wherever the masks of the quantised linears of ``model`` say so."""
    for name, module in quantised_linears(model):
        other: Any = plain.get_submodule(name.replace(".base_layer", ""))
        weight = dequantised(other) if is_quantised(other) else other.weight
        check_zeros(weight.T if isinstance(other, Conv1D) else weight, module, f"exported {name}")


def base_weights(model: PreTrainedModel, but: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Returns the state dict of ``model`` as it would be without its adapter, but for names that begin so."""
    state = {name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if ".lora_" not in name}
    return {name: tensor for name, tensor in state.items() if not name.startswith(but)}


def _name_base(adapter: Path) -> None:
    """Makes the folder that the adapter lies in its base."""
    config = json.loads(adapter.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "."
    adapter.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
