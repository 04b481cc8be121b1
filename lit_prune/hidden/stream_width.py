"""The modules that read and write the residual stream, and the dimensions of it that they keep.

Suffixes: K dimensions that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.models.families import dense_family, head_dim
from lit_prune.models.remote_code.modeling_shrunk import LayerConfig, layer_config
from lit_prune.models.remote_code.modeling_sliced import LLAMA, PHI3, Layout
from lit_prune.shrink.units.narrow import adopt_sizes

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "ministral", "mistral", "qwen2", "qwen3", "smollm3"), LLAMA),
    "phi3": PHI3,
}


def layout_of(model: PreTrainedModel) -> Layout:
    """Returns where the family's modules are that read and write the stream."""
    return LAYOUTS[dense_family(model.config)]


def stream_fields(config: Any, width: int) -> dict[str, int]:
    """Returns the fields of the config of a model whose stream has ``width`` dimensions."""
    return {"hidden_size": width, "head_dim": head_dim(config)}


def parameters_of_a_dimension(model: PreTrainedModel) -> int:
    """Returns the number of parameters that go with one dimension of the stream, tied weights counted once."""
    counts: dict[int, int] = {}
    for module, axis in _modules(model, layout_of(model)):
        for parameter in _parameters(module, axis).values():
            counts[id(parameter)] = parameter.numel() // parameter.shape[axis]
    return sum(counts.values())


def narrow_layer(layer: nn.Module, layout: Layout, kept_K: Tensor, config: Any, index: int) -> None:
    """Removes all other dimensions of the stream from a block, in place.

    Args:
        layer: The block.
        layout: Where its modules are.
        kept_K: The dimensions that stay, ascending.
        config: The config of the model's text part, still with the former width.
        index: Number of the block.
    """
    for module, axis in _modules_of_layer(layer, layout):
        keep_dimensions(module, kept_K, axis)
    adopt_sizes(layer, LayerConfig(layer_config(config, index), stream_fields(config, len(kept_K))), index)


@torch.no_grad()
def keep_dimensions(module: nn.Module, kept_K: Tensor, axis: int) -> None:
    """Removes all other entries of a module's weights along one axis, in place."""
    for name, parameter in _parameters(module, axis).items():
        smaller = parameter.detach().index_select(axis, kept_K.to(parameter.device))
        setattr(module, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
    if isinstance(module, nn.Embedding):
        module.embedding_dim = len(kept_K)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def narrow_ends(model: PreTrainedModel, layout: Layout, kept_K: Tensor) -> None:
    """Removes all other dimensions of the stream from the embedding, the last norm and the head, in place."""
    embedding, head = model.get_submodule(layout.embeddings[0]), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    keep_dimensions(embedding, kept_K, 1)
    keep_dimensions(model.get_submodule(layout.final_norm), kept_K, 0)
    keep_dimensions(head, kept_K, 1)
    if tied:
        head.weight = embedding.weight


def set_width(model: PreTrainedModel, width: int) -> None:
    """Records the width in the config, and the size of a head, and in those modules that remember it."""
    config: Any = model.config.get_text_config()
    for name, value in stream_fields(config, width).items():
        setattr(config, name, value)
    for index, layer in enumerate(model.get_submodule(layout_of(model).layers).children()):
        adopt_sizes(layer, layer_config(config, index), index)


def _modules(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[nn.Module, int]]:
    """The modules of a model that read or write the stream, each with the axis of its dimensions in the weight."""
    yield model.get_submodule(layout.embeddings[0]), 1
    for layer in model.get_submodule(layout.layers).children():
        yield from _modules_of_layer(layer, layout)
    yield model.get_submodule(layout.final_norm), 0
    yield model.get_output_embeddings(), 1


def _modules_of_layer(layer: nn.Module, layout: Layout) -> Iterator[tuple[nn.Module, int]]:
    for step in layout.steps:
        yield layer.get_submodule(step.norm), 0
        yield from ((layer.get_submodule(name), 1) for name in step.readers)
        yield from ((layer.get_submodule(name), 0) for name in step.writers)


def _parameters(module: nn.Module, axis: int) -> dict[str, nn.Parameter]:
    """The module's own parameters that have the axis; the bias of a linear goes with its rows."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if axis == 0 or parameter.ndim == 2
    }
