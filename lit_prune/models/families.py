"""The Hugging Face families: where each has its decoder layers. ``linears.py`` finds the linears in them by itself.

A family is one entry of ``FAMILIES``. Masks need only the path of the blocks, so that a family without an entry can be
pruned by giving that path.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.models import structure
from lit_prune.models.linears import PrunableLinear, linears_of
from lit_prune.models.on_disk import Offload, on_disk


@dataclass(frozen=True)
class Family:
    """Where a family's parts are, as dotted paths from the causal LM.

    Attributes:
        blocks: The list of decoder layers.
        supports_packing: Whether attention stays within a packed conversation, where `position_ids` begin at 0 again.
            It does in
            families whose attention masks transformers derives from the positions.
    """

    blocks: str
    supports_packing: bool = True


FAMILIES: dict[str, Family] = {
    "falcon": Family(blocks="transformer.h", supports_packing=False),
    "gemma2": Family(blocks="model.layers"),
    "gemma3_text": Family(blocks="model.layers"),
    "gpt2": Family(blocks="transformer.h"),
    "gpt_neox": Family(blocks="gpt_neox.layers"),
    "llama": Family(blocks="model.layers"),
    "mistral": Family(blocks="model.layers"),
    "mixtral": Family(blocks="model.layers"),
    "opt": Family(blocks="model.decoder.layers", supports_packing=False),
    "phi": Family(blocks="model.layers"),
    "phi3": Family(blocks="model.layers"),
    "qwen2": Family(blocks="model.layers"),
    "qwen3": Family(blocks="model.layers"),
    "qwen3_moe": Family(blocks="model.layers"),
}


@dataclass(frozen=True)
class Block:
    """A decoder layer and its linears that are to be pruned.

    Attributes:
        index: Number of the layer, from 0.
        module: The layer.
        linears: The linears by their name within the block.
        path: Dotted path of the layer in the model.
        offload: The files of the model, if its weights stay on disk.
    """

    index: int
    module: nn.Module
    linears: dict[str, PrunableLinear]
    path: str = ""
    offload: Offload | None = None

    @property
    def size(self) -> int:
        """Number of prunable weights."""
        return sum(linear.size for linear in self.linears.values())

    @property
    def pruned(self) -> int:
        """Number of them that are pruned."""
        return sum(linear.pruned for linear in self.linears.values())


def _family_name(config: PreTrainedConfig) -> str:
    """The dense family, which sliced models have their layers in common with."""
    return config.model_type.removeprefix("sliced_")


def is_known(config: PreTrainedConfig) -> bool:
    """Returns whether the family of a model with this config has an entry."""
    return _family_name(config) in FAMILIES


def supports_packing(config: PreTrainedConfig) -> bool:
    """Returns whether a model with this config keeps packed conversations apart; False for an unknown family."""
    return is_known(config) and FAMILIES[_family_name(config)].supports_packing


def blocks_path(config: PreTrainedConfig, blocks: str | None = None) -> str:
    """Returns the dotted path of the blocks of a model with this config, or ``blocks`` where that is given.

    Raises:
        InputError: for a family without an entry, naming those that have one.
    """
    if blocks is not None:
        return blocks
    if is_known(config):
        return FAMILIES[_family_name(config)].blocks
    raise InputError(
        f"`pruning.blocks` must be given for the family {config.model_type!r}, which is not one of "
        f"{', '.join(sorted(FAMILIES))}: masks need only the dotted path of the decoder layers, such as model.layers."
    )


def find_blocks(
    model: PreTrainedModel,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    blocks: str | None = None,
    quantised: bool = False,
) -> list[Block]:
    """Returns the blocks of ``model`` in order, each with its chosen linears.

    Args:
        model: A Hugging Face causal LM.
        targets: Name suffixes or regular expressions of the linears to prune; None takes all.
        ignore: Suffixes or regular expressions of linears to leave alone.
        blocks: Dotted path of the blocks, for a family without an entry.
        quantised: Include linears in 4 or 8 bits, which can be read but not pruned.

    Raises:
        InputError: for an unknown family, a path that is no list of blocks, names that match nothing or leave a block
            without any, weights that are quantised, hidden under an adapter, or fused in an unknown way.
    """
    path = blocks_path(model.config, blocks)
    try:
        layers = model.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"`pruning.blocks` must be a path in the model, got {path!r}: {error}.") from error
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise InputError(
            f"`pruning.blocks` must lead to a list of decoder layers, {path!r} is {type(layers).__name__}."
        )
    every = [linears_of(layer) for layer in layers]
    _check_linears(model, every, layers, quantised)
    names = dict.fromkeys(name for linears in every for name in linears)  # blocks differ where some have no experts
    _check_patterns(names, {"targets": targets or [], "ignore": ignore})
    return [
        Block(index, layer, _chosen(index, every[index], targets, ignore), f"{path}.{index}", on_disk(model))
        for index, layer in enumerate(layers)
    ]


def _check_linears(
    model: PreTrainedModel, every: Sequence[Mapping[str, PrunableLinear]], layers: nn.ModuleList, quantised: bool
) -> None:
    for linears, layer in zip(every, layers, strict=True):
        if not linears:
            kinds = ", ".join(sorted({type(module).__name__ for module in layer.modules()}))
            raise InputError(f"`pruning.blocks` must lead to blocks with linears, there is none among {kinds}.")
        for name, linear in linears.items():
            adapted = ".base_layer" in name or "lora_" in name
            if not linear.parameter.is_floating_point() and (adapted or not quantised):
                raise InputError(_quantised(name, linear))
            if adapted:
                raise InputError(_adapted(name, masked=structure.masked(model)))


def _quantised(name: str, linear: PrunableLinear) -> str:
    return (
        f"`model` must be pruned in full precision, {name} is quantised ({linear.parameter.dtype}): prune the model "
        "that it was made from, and quantise after that; QLoRA leaves weights that can be pruned again where it was "
        "trained with `--pruning.recovery.form merged`."
    )


def _adapted(name: str, *, masked: bool) -> str:
    """The remedy for an adapter; LoRA over masks cannot be merged, it would fill every zero."""
    rule = f"`model` must be pruned before adapters are attached, {name} is under one"
    if masked:
        return (
            f"{rule}, over masks whose zeros a merge would fill: train with `--pruning.recovery MaskedLoRA`, which is "
            "merged, or give up what was trained by moving adapter_config.json and adapter_model.safetensors out of "
            "the folder."
        )
    return f"{rule}: merge it by peft's `merge_and_unload`, save that as a folder of its own, and prune it."


def _check_patterns(names: Collection[str], chosen_by: Mapping[str, Sequence[str]]) -> None:
    for field, patterns in chosen_by.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"`pruning.{field}` must be suffixes or regular expressions, {pattern!r}: {error}."
                ) from error
            if not any(matches(name, pattern) for name in names):
                raise InputError(f"`pruning.{field}` must match a linear, got {pattern!r}; there are {_some(names)}.")


def _chosen(
    index: int, every: dict[str, PrunableLinear], targets: Sequence[str] | None, ignore: Sequence[str]
) -> dict[str, PrunableLinear]:
    chosen = {
        name: linear
        for name, linear in every.items()
        if (targets is None or any(matches(name, pattern) for pattern in targets))
        and not any(matches(name, pattern) for pattern in ignore)
    }
    if not chosen:
        raise InputError(
            f"`pruning.targets` and `pruning.ignore` leave nothing to prune in block {index} of {_some(every)}."
        )
    return chosen


def _some(names: Collection[str]) -> str:
    """The names in one line; of a layer's experts only those of the first."""
    return ", ".join(name for name in names if re.search(r"\.[1-9]\d*\.", name) is None)


def matches(name: str, pattern: str) -> bool:
    """Returns whether ``pattern`` is the whole of ``name``, a dotted suffix of it, or a regular expression for it.

    >>> matches("self_attn.q_proj", "q_proj"), matches("mlp.up_proj", r"mlp\\..*"), matches("mlp.up_proj", "proj")
    (True, True, False)
    """
    return name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) is not None
