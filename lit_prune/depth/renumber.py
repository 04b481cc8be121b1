"""Blocks taken out of a model: everything that depends on the number of a block is given the new number.

A family's own class builds a block from the config and the block's number, on which its layer type, its place in the
cache and its experts may depend. What another number would change is found by building the model twice without weights,
with the config before and after, and comparing the blocks attribute by attribute.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.models.families import dense_family
from lit_prune.shrink.units.narrow import SIZES, set_sizes

BY_BLOCK = (  # fields of configs with a value for every block
    "activation_sparsity_pattern",
    "indexer_types",
    "intermediate_size",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
)
NUMBERS = ("attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids", "mlp_only_layers", "moe_layers")  # of blocks
FIRST = (  # how many of the first blocks differ
    "first_k_dense_replace",
    "max_window_layers",
    "moe_layer_start_index",
    "num_dense_layers",
)
LAST_NUMBER = ("moe_layer_end_index",)  # number of the last block of a kind
LAST = ("num_kv_shared_layers",)  # how many of the last blocks differ
PLAIN = (bool, int, float, str, list, tuple, type(None))

Update = tuple[int, str, str, Any]  # number of the block before, module within it, attribute, new value


class NotRenumbered(Exception):
    """The family's class and config have no way to express the remaining blocks; the message says why."""


def drop_blocks(model: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    """Removes all blocks of ``model`` but ``kept``, in place, and renumbers these.

    Args:
        model: The causal LM, without an adapter.
        path: Dotted path of the list of blocks.
        kept: Numbers of the blocks that stay, in order.

    Raises:
        InputError: if the family cannot have these blocks alone; the model is not changed.
    """
    fields, updates = _changes(model, path, kept)
    layers: Any = model.get_submodule(path)
    for block, module, name, value in updates:
        setattr(layers[block].get_submodule(module), name, value)
    parent, _, name = path.rpartition(".")
    remaining = nn.ModuleList(layers[block] for block in kept)
    setattr(model.get_submodule(parent), name, remaining)
    config = model.config.get_text_config()
    for name, value in fields.items():
        setattr(config, name, value)
    if SIZES in fields:
        set_sizes(model, remaining, fields[SIZES])


def check_renumbering(model: PreTrainedModel, path: str) -> None:
    """Raises InputError if blocks of ``model`` cannot be renumbered, by the example of the first two and the last."""
    layers: Any = model.get_submodule(path)
    for gone in sorted({0, min(1, len(layers) - 1), len(layers) - 1}):
        _changes(model, path, [block for block in range(len(layers)) if block != gone])


def renumbered(config: Any, kept: Sequence[int]) -> dict[str, Any]:
    """Returns the fields of ``config`` that other blocks need, with their new values.

    Of the layer types [sliding, full, sliding] blocks [0, 2] have [sliding, sliding]; `mlp_only_layers` [2] is [1].

    Args:
        config: The config of the language model.
        kept: Numbers of the blocks that stay.
    """
    blocks: int = config.num_hidden_layers
    fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
    new_number = {old: new for new, old in enumerate(kept)}
    present = {name: value for name, value in config.to_dict().items() if value is not None}
    if present.get("decoder_sparse_step", 1) != 1:
        present["mlp_only_layers"] = _without_experts(present, blocks)
        fields["decoder_sparse_step"] = 1
    for name, value in present.items():
        if name in BY_BLOCK and isinstance(value, (list, tuple)) and len(value) >= blocks:
            fields[name] = [value[block] for block in kept]
        elif name in NUMBERS:
            fields[name] = [new_number[block] for block in value if block in new_number]
        elif name in FIRST:
            fields[name] = sum(block < value for block in kept) + max(0, value - blocks)
        elif name in LAST_NUMBER:
            fields[name] = sum(block <= value for block in kept) - 1
        elif name in LAST:
            fields[name] = sum(block >= blocks - value for block in kept)
        elif name == SIZES:
            fields[name] = {size: [values[block] for block in kept] for size, values in value.items()}
    return fields


def _without_experts(config: Mapping[str, Any], blocks: int) -> list[int]:
    """Returns the numbers of the blocks without experts, of a config with experts in every n-th block."""
    step = config["decoder_sparse_step"]
    listed = config.get("mlp_only_layers") or []
    return [block for block in range(blocks) if block in listed or (block + 1) % step]


def _changes(model: PreTrainedModel, path: str, kept: Sequence[int]) -> tuple[dict[str, Any], list[Update]]:
    """Returns the new values of fields of the config and of attributes of modules.

    Raises:
        InputError: if the family cannot have these blocks alone.
    """
    fields = renumbered(model.config.get_text_config(), kept)
    try:
        before, after = _on_meta(model, {}), _on_meta(model, fields)
        _check_rest(before, after, path)
        return fields, list(_updates(before.get_submodule(path), after.get_submodule(path), kept))
    except NotRenumbered as reason:
        raise InputError(
            f"`pruning.method` Depth cannot remove blocks of the family {dense_family(model.config)!r}: {reason}."
        ) from reason


def _on_meta(model: PreTrainedModel, fields: Mapping[str, Any]) -> Any:
    """Returns a model without weights of the class and the config of ``model``, with other ``fields``.

    The config is taken to a dict and back, as if it had been written and read.
    """
    kind: Any = type(model)
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config.get_text_config(), name, value)
    try:
        with torch.device("meta"):
            return kind(type(config).from_dict(config.to_dict()))
    except Exception as error:  # whatever the constructor of an unknown family raises
        raise NotRenumbered(f"no model can be built from its config with fewer blocks ({error})") from error


def _check_rest(before: nn.Module, after: nn.Module, path: str) -> None:
    """Raises NotRenumbered if a weight outside the blocks depends on their number."""
    shapes, others = _shapes(before), _shapes(after)
    for name, shape in shapes.items():
        if not name.startswith(f"{path}.") and others.get(name) != shape:
            raise NotRenumbered(f"the shape of {name} depends on the number of blocks")


def _updates(before: Any, after: Any, kept: Sequence[int]) -> Iterator[Update]:
    """Yields the attributes that are numbers of blocks, with the new numbers.

    Raises:
        NotRenumbered: if anything else depends on the number of a block.
    """
    numbers = {old: new for new, old in enumerate(kept)}
    for new, old in enumerate(kept):
        if _shapes(before[old]) != _shapes(after[new]):
            raise NotRenumbered(f"as block {new}, block {old} would have other weights")
        for path, module in before[old].named_modules():
            like = vars(after[new].get_submodule(path))
            for name, value in vars(module).items():
                if isinstance(value, PLAIN) and value != like.get(name):
                    if type(value) is not int or numbers.get(value) != like.get(name):
                        raise NotRenumbered(f"{path}.{name} of block {old} depends on its number".lstrip("."))
                    yield old, path, name, like[name]


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}
