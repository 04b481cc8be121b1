"""Shrunk causal LMs: Hugging Face classes of models whose decoder layers differ in size.

This file needs only torch and transformers, and is saved with every exported folder, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` opens it where lit_prune is not installed.

A shrunk model is its family's own model, of which every decoder layer was built with sizes of its own. They are in the
config under ``block_sizes``, one list for each field of the config that differs between the layers:

    "block_sizes": {"intermediate_size": [1152, 768, 1536]}

A model whose layers all have the same sizes needs no class of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

PREFIX = "shrunk_"  # of the model type: shrunk_llama
FAMILIES = (
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "ministral",
    "mistral",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
    "starcoder2",
)


class LayerConfig:
    """The config of one decoder layer: the model's config, in which some fields have other values.

    Fields that the layer shares with the model are read from the model's config whenever they are used, so that they
    can still be changed there.
    """

    def __init__(self, config: Any, sizes: Mapping[str, int]) -> None:
        self.shared, self.sizes = config, dict(sizes)

    def __getattr__(self, name: str) -> Any:
        if name in ("shared", "sizes"):  # not set yet, in a copy
            raise AttributeError(name)
        return self.sizes[name] if name in self.sizes else getattr(self.shared, name)


def layer_config(config: Any, index: int) -> Any:
    """Returns the config of the decoder layer ``index``: ``config`` itself for a model whose layers do not differ."""
    sizes = getattr(config, "block_sizes", None)
    return LayerConfig(config, {name: values[index] for name, values in sizes.items()}) if sizes else config


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the list of the decoder layers of ``model``."""
    count = model.config.num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(lists)  # lists within a layer come later


class ShrunkCausalLM(PreTrainedModel):
    """A causal LM with layers of the sizes in ``config.block_sizes``; mixed into a family's own model."""

    def __init__(self, config: Any) -> None:
        count = config.num_hidden_layers
        for name, values in (config.block_sizes or {}).items():
            if len(values) != count:
                raise ValueError(f"`block_sizes` must have {count} values of {name}, one a layer, got {values}.")
        super().__init__(config)
        layers = decoder_layers(self)
        for index, layer in enumerate(layers):
            kind: Any = type(layer)
            layers[index] = kind(layer_config(config, index), index)
        self.post_init()


def block_configs(config: Any) -> list[SimpleNamespace]:
    """Returns the sizes of every layer in the form that vLLM's DeciLM reads: Llama with MLPs of different widths.

    Raises:
        AttributeError: if the layers differ in anything else. DeciLM has the same number of queries in all of them.
    """
    sizes = getattr(config, "block_sizes", None) or {}
    if other := sorted(sizes.keys() - {"intermediate_size"}):
        raise AttributeError(f"`block_configs`: all layers must have the same {', '.join(other)} for vLLM.")
    heads = config.num_attention_heads // config.num_key_value_heads
    widths = sizes.get("intermediate_size") or [config.intermediate_size] * config.num_hidden_layers
    return [
        SimpleNamespace(
            attention=SimpleNamespace(no_op=False, n_heads_in_group=heads),
            ffn=SimpleNamespace(no_op=False, intermediate_size=width),
        )
        for width in widths
    ]


def _classes(family: str) -> tuple[Any, Any]:
    """Creates the config class and the model class of shrunk models of a family."""
    base_config: Any = CONFIG_MAPPING[family]
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    fields: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{base_config.__name__} with ``block_sizes``.",
        "__annotations__": {"block_sizes": dict[str, list[int]] | None},
        "model_type": f"{PREFIX}{family}",
        "block_sizes": None,
    }
    if family == "llama":
        fields["block_configs"] = property(block_configs)
    config = type(f"Shrunk{base_config.__name__}", (base_config,), fields)
    described = {"__module__": __name__, "__doc__": f"{base.__name__}, shrunk.", "config_class": config}
    return config, type(f"Shrunk{base.__name__}", (ShrunkCausalLM, base), described)


SHRUNK: dict[str, Any] = {}
for _family in filter(CONFIG_MAPPING.__contains__, FAMILIES):  # other versions of transformers may lack one
    _config, SHRUNK[_family] = _classes(_family)
    globals().update({kind.__name__: kind for kind in (_config, SHRUNK[_family])})  # where ``auto_map`` looks for them
    _config.register_for_auto_class()
    SHRUNK[_family].register_for_auto_class("AutoModelForCausalLM")


def register() -> None:
    """Registers the shrunk families with transformers' Auto classes; a second call changes nothing."""
    for kind in SHRUNK.values():
        AutoConfig.register(kind.config_class.model_type, kind.config_class, exist_ok=True)
        AutoModelForCausalLM.register(kind.config_class, kind, exist_ok=True)


if __name__ == "lit_prune.models.remote_code.modeling_shrunk":  # a copy in a folder is found by the folder's auto_map
    register()
