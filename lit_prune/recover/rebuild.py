"""How a model that was pruned and readied for recovery is made again, so that a checkpoint's weights fit it."""

from __future__ import annotations

from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from transformers import PreTrainedModel

from lit_prune.masks.freeze import freeze_zeros, freezes_zeros
from lit_prune.models import structure
from lit_prune.models.modeling_sliced import SlicedCausalLM, take_shape
from lit_prune.models.quantised import make_loadable, quantisation
from lit_prune.recover.adapter import adapter_config, add_adapter, has_masked_adapter
from lit_prune.recover.quantise import quantise


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Returns all that :func:`rebuild` needs to give a fresh copy of the dense model the structure of ``model``."""
    return {
        "record": structure.record(model),
        "slice_sizes": getattr(model.config, "slice_sizes", None),
        "quantised": quantisation(model),
        "adapter": adapter_config(model),
        "masked_adapter": has_masked_adapter(model),
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "freezes_zeros": freezes_zeros(model),
    }


def rebuild(model: PreTrainedModel, stored: dict[str, Any]) -> None:
    """Gives ``model`` the structure that ``stored`` tells, so that a checkpoint's weights fit; twice is as once."""
    structure.write(model, **stored["record"])
    if stored["slice_sizes"] is not None and not isinstance(model, SlicedCausalLM):
        take_shape(model, stored["slice_sizes"])
    if stored.get("quantised") is not None and quantisation(model) is None:
        quantise(model, **stored["quantised"])
    make_loadable(model)
    fields = stored["adapter"]
    if fields is not None and adapter_config(model) is None:
        kind: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[fields["peft_type"]]
        config = kind(**{key: value for key, value in fields.items() if key != "peft_type"})
        add_adapter(model, config, masked=stored.get("masked_adapter", False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stored["trained"])
    if stored.get("freezes_zeros"):
        freeze_zeros(model)
