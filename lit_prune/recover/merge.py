"""Copies of a model without its adapter, which is merged into the weights or left out."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.models.custom_code import runs_custom_code
from lit_prune.models.quantised import (
    bitsandbytes_config,
    dense,
    dequantised,
    is_quantised,
    quantisation,
    quantised_linears,
    sharing_weight,
    unquantised,
)
from lit_prune.models.remote_code.modeling_sliced import untied_head
from lit_prune.recover import adapter_config, mark_quantised, merged_weight
from lit_prune.recover.adapter import trains_tied_head


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of ``model`` in full precision with the adapter merged into its weights.

    Weights that have no adapter and are not quantised are shared with ``model``. A head that was tied to the embedding
    and has an adapter gets a weight of its own, and the copy's config says so.
    """
    plain = without_adapter(model)
    if trains_tied_head(model):
        untied_head(plain)
        plain.config.get_text_config().tie_word_embeddings = False  # of a multimodal model, which has two configs
    for name, module in list(quantised_linears(plain)):
        plain.set_submodule(name, dense(module, dequantised(module)))
    record_quantisation(plain)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight, linear = merged_weight(layer), plain.get_submodule(name)
            transposed = is_quantised(layer.get_base_layer()) and isinstance(linear, Conv1D)
            linear.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
    return plain


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model without the adapter that shares the weights of ``model``; ``model`` itself if it has none."""
    return model if adapter_config(model) is None else sharing_weights(model)


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Returns another model without an adapter whose weights are those of ``model``, not copied."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(
            unquantised(model.config), dtype=model.dtype, trust_remote_code=runs_custom_code(model)
        )
    quantised = {name.replace(".base_layer", ""): module for name, module in quantised_linears(model)}
    for name, module in quantised.items():
        plain.set_submodule(name, sharing_weight(module))
    prefixes = tuple(f"{name}." for name in quantised)
    keys = plain.load_state_dict(base_weights(model, exclude=prefixes), strict=False, assign=True)
    assert all(name.startswith(prefixes) for name in (*keys.missing_keys, *keys.unexpected_keys)), keys
    share_buffers(model, plain)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    record_quantisation(plain)
    return plain


def share_buffers(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Shares with ``plain`` the buffers of ``model`` that are in no state dict, such as rotary frequencies."""
    for name, buffer in model.named_buffers():
        path, _, last = name.replace(".base_layer.", ".").rpartition(".")
        module = plain.get_submodule(path)
        if last in module._buffers and module._buffers[last].is_meta:  # type: ignore[union-attr]
            module._buffers[last] = buffer


def record_quantisation(model: PreTrainedModel) -> None:
    """Sets or removes ``quantization_config`` in the config of ``model``, by which transformers loads its linears."""
    mark_quantised(model)
    model.config = unquantised(model.config)
    if quantisation(model) is not None:
        model.config.quantization_config = bitsandbytes_config(model)


def base_weights(model: PreTrainedModel, exclude: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Returns the state dict that ``model`` would have without its adapter, less names that begin with ``exclude``."""
    state = {name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if ".lora_" not in name}
    return {name: tensor for name, tensor in state.items() if not name.startswith(exclude)}
