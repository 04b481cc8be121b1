"""What a recovery is, and how a model's adapter is told, rebuilt and stored."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from transformers import PreTrainedModel

from lit_prune import structure
from lit_prune.modeling_sliced import SlicedCausalLM, take_shape


class Recovery(ABC):
    """What is trained after the cut, so that the model heals and the pruned weights stay pruned."""

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 (most have nothing to check)
        """Raises InputError where the settings do not fit ``model``, before anything is done to it."""

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> None:
        """Makes ``model`` ready to be trained, in place: what is to learn requires gradients, nothing else does."""


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


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> None:
    """Adds an adapter to ``model`` in place.

    Its dropout follows the model's mode, which peft leaves to the caller. It names no base: the dense model, which peft
    would name, has other weights.
    """
    model.add_adapter(config)
    config.base_model_name_or_path = None
    model.train(model.training)
