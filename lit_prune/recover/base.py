"""What a recovery is, and how a model's adapter is told, rebuilt and stored."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune import structure
from lit_prune.modeling_sliced import SlicedCausalLM, take_shape


class Recovery(ABC):
    """What is trained after a cut, so that the model heals and the pruned weights stay pruned; or before the first.

    Attributes:
        folds_under_masks: Whether :meth:`detach` keeps the zeros of a masked model.
    """

    folds_under_masks: ClassVar[bool] = False

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 (most have nothing to check)
        """Raises InputError where the settings do not fit ``model``, before anything is done to it."""

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> None:
        """Makes ``model`` ready to be trained, in place: what is to learn requires gradients, nothing else does."""

    def detach(self, model: PreTrainedModel) -> None:
        """Folds what was learnt into the weights of ``model``, in place, and leaves no adapter: the next cut comes."""
        fold_adapter(model)


def adapter_config(model: PreTrainedModel) -> dict[str, Any] | None:
    """Returns the config of the adapter on ``model``, as JSON can hold it; None without one."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return None
    fields: dict[str, Any] = model.peft_config["default"].to_dict()  # type: ignore[attr-defined]
    return json.loads(json.dumps(fields, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Returns all that :func:`rebuild` needs to give a fresh copy of the dense model the structure of ``model``."""
    return {
        "record": structure.record(model),
        "slice_sizes": getattr(model.config, "slice_sizes", None),
        "adapter": adapter_config(model),
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
    }


def rebuild(model: PreTrainedModel, stored: dict[str, Any]) -> None:
    """Gives ``model`` the structure that ``stored`` tells, so that a checkpoint's weights fit; twice is as once."""
    structure.write(model, **stored["record"])
    if stored["slice_sizes"] is not None and not isinstance(model, SlicedCausalLM):
        take_shape(model, stored["slice_sizes"])
    fields = stored["adapter"]
    if fields is not None and adapter_config(model) is None:
        kind: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[fields["peft_type"]]
        add_adapter(model, kind(**{key: value for key, value in fields.items() if key != "peft_type"}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stored["trained"])


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> None:
    """Adds an adapter to ``model`` in place.

    Its dropout follows the model's mode, which peft leaves to the caller. It names no base: the dense model, which peft
    would name, has other weights.
    """
    model.add_adapter(config)
    config.base_model_name_or_path = None
    model.train(model.training)


@torch.no_grad()
def fold_adapter(model: PreTrainedModel) -> None:
    """Adds the adapter of ``model`` to its weights, in place, and takes it off; does nothing without one."""
    if adapter_config(model) is None:
        return
    assert not structure.masked(model), "B A is dense, and would fill the zeros"
    for name, layer in adapted_layers(model).items():
        weight = layer.get_base_layer().weight
        weight.copy_(merged_weight(layer))
        model.set_submodule(name, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config


def adapted_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Returns every layer that has an adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def merged_weight(layer: Any) -> Tensor:
    """Returns W + B A of a layer with an adapter, in the weight's type; the sum is taken in float32 at least."""
    weight: nn.Parameter = layer.get_base_layer().weight
    delta, wide = layer.get_delta_weight("default"), torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + delta.to(weight.device, wide)).to(weight.dtype)
