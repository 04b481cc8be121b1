"""A model without its adapter: merged into the weights, or left out."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
from lit_prune.recover import adapter_config, mark, merged_weight


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model in full precision without the adapter, which is merged in; ``model`` is left as it is.

    Weights without an adapter are shared, unless they are quantised.
    """
    plain = without_adapter(model)
    for name, module in list(quantised_linears(plain)):
        plain.set_submodule(name, dense(module, dequantised(module)))
    record_quantisation(plain)
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
        plain.set_submodule(name, sharing_weight(module))
    within = tuple(f"{name}." for name in packed)
    told = plain.load_state_dict(base_weights(model, but=within), strict=False, assign=True)
    assert all(name.startswith(within) for name in (*told.missing_keys, *told.unexpected_keys)), told
    share_buffers(model, plain)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    record_quantisation(plain)
    return plain


def share_buffers(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Gives ``plain`` the buffers of ``model`` that no state dict has, such as rotary frequencies, so that it runs."""
    for name, buffer in model.named_buffers():
        path, _, last = name.replace(".base_layer.", ".").rpartition(".")
        module = plain.get_submodule(path)
        if last in module._buffers and module._buffers[last].is_meta:  # type: ignore[union-attr]
            module._buffers[last] = buffer


def record_quantisation(model: PreTrainedModel) -> None:
    """Has the config of ``model`` say how its linears are quantised, so that transformers opens them, or not."""
    mark(model)
    model.config = unquantised(model.config)
    if quantisation(model) is not None:
        model.config.quantization_config = bitsandbytes_config(model)


def base_weights(model: PreTrainedModel, but: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Returns the state dict of ``model`` as it would be without its adapter, but for names that begin so."""
    state = {name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if ".lora_" not in name}
    return {name: tensor for name, tensor in state.items() if not name.startswith(but)}
