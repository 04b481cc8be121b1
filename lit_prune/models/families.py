"""The decoder layers of Hugging Face causal LMs. ``linears.py`` finds the linears in them by itself.

Families whose attention was tested with packed conversations have an entry in ``FAMILIES``. In any other family the
blocks are the only list of modules as long as the text config says; their path is asked for where that is ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.models import structure
from lit_prune.models.linears import ExpertSlice, PrunableLinear, check_experts, has_fused_experts, linears_of
from lit_prune.models.on_disk import Offload, on_disk

CustomClass = Literal["sliced", "shrunk"]


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
        rates: The share to remove from each linear, or each part of the block, if they are planned one by one.
    """

    index: int
    module: nn.Module
    linears: dict[str, PrunableLinear]
    path: str = ""
    offload: Offload | None = None
    rates: Mapping[str, float] | None = None

    @property
    def path_of_list(self) -> str:
        """Dotted path of the list of blocks that the layer is in."""
        return self.path.rpartition(".")[0]

    @property
    def size(self) -> int:
        """Number of prunable weights."""
        return sum(linear.size for linear in self.linears.values())

    @property
    def pruned(self) -> int:
        """Number of them that are pruned."""
        return sum(linear.pruned for linear in self.linears.values())


def config_of(block: Block) -> PreTrainedConfig:
    """Returns the config that the modules of a block keep, for callers that do not have the model."""
    return next(module.config for module in block.module.modules() if hasattr(module, "config"))  # type: ignore[return-value]


def head_dim(config: PreTrainedConfig) -> int:
    """Returns the size of an attention head, whose default depends on the width of the stream."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def dense_family(config: PreTrainedConfig) -> str:
    """Returns the `model_type` without the prefix of sliced and shrunk models, whose layers are those of the family."""
    return config.model_type.removeprefix("sliced_").removeprefix("shrunk_")


def custom_class(config: PreTrainedConfig) -> CustomClass | None:
    """Returns the kind of a model of a class that transformers does not have; None for the family's own class."""
    return next((kind for kind in get_args(CustomClass) if config.model_type.startswith(f"{kind}_")), None)


def supports_packing(config: PreTrainedConfig) -> bool:
    """Returns whether models with this config keep packed conversations apart; False for families without an entry."""
    family = FAMILIES.get(dense_family(config))
    return family is not None and family.supports_packing


def has_blocks(model: PreTrainedModel) -> bool:
    """Returns whether the blocks of ``model`` are found without their path."""
    return dense_family(model.config) in FAMILIES or len(_candidates(model)) == 1


def blocks_path(model: PreTrainedModel, blocks: str | None = None) -> str:
    """Returns the dotted path of the blocks of ``model``, or ``blocks`` where that is given.

    Args:
        model: A causal LM; one on the meta device serves as well.
        blocks: The path that the user gave.

    Raises:
        InputError: if the family has no entry and the model not exactly one list of as many modules as it has layers.
    """
    if blocks is not None:
        return blocks
    family = FAMILIES.get(dense_family(model.config))
    if family is not None:
        return family.blocks
    paths = _candidates(model)
    if len(paths) == 1:
        return paths[0]
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = f"{', '.join(paths)} all have" if paths else "none has"
    raise InputError(
        f"`pruning.blocks` must be given for the family {model.config.model_type!r}: of the model's lists of modules "
        f"{lists} {layers} with linears, the number of its layers. It is the dotted path of the decoder layers, such "
        "as model.layers."
    )


def _candidates(model: PreTrainedModel) -> list[str]:
    """The paths of the lists that may be the decoder layers; of several, those in the text decoder."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    paths = [path for path, module in model.named_modules() if _is_list_of_layers(module, layers)]
    paths = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]  # experts of a layer
    if len(paths) > 1:
        decoder = model.get_decoder()
        prefix = next((f"{path}." for path, module in model.named_modules() if path and module is decoder), "")
        paths = [path for path in paths if path.startswith(prefix)] or paths
    return paths


def _is_list_of_layers(module: nn.Module, layers: int | None) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == layers and all(linears_of(layer) for layer in module)


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
        ignore: Suffixes or regular expressions of linears, or modules of fused experts, to leave alone.
        blocks: Dotted path of the blocks, where they are not found by themselves.
        quantised: Include linears in 4 or 8 bits, which can be read but not pruned.

    Raises:
        InputError: for blocks that are not found, a path that is no list of blocks, names that match nothing or leave a
            block without any, weights that are quantised or hidden under an adapter.
    """
    path = blocks_path(model, blocks)
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
    _check_patterns("targets", targets or [], names)
    _check_patterns("ignore", ignore, names, _paths_of_experts(layers))
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


def _check_patterns(field: str, patterns: Sequence[str], names: Collection[str], modules: Collection[str] = ()) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"`pruning.{field}` must be suffixes or regular expressions, {pattern!r}: {error}."
            ) from error
        if not any(matches(name, pattern) for name in (*names, *modules)):
            raise InputError(f"`pruning.{field}` must match a linear, got {pattern!r}; there are {_some(names)}.")


def _paths_of_experts(layers: nn.ModuleList) -> set[str]:
    return {path for layer in layers for path, module in layer.named_modules() if has_fused_experts([module])}


def check_experts_of(blocks: Sequence[Block], ignore: Sequence[str]) -> None:
    """Raises InputError for fused experts of an unsupported layout that ``ignore`` does not match."""
    for block in blocks:
        check_experts(block.module, lambda path: any(matches(path, pattern) for pattern in ignore))


def _chosen(
    index: int, every: dict[str, PrunableLinear], targets: Sequence[str] | None, ignore: Sequence[str]
) -> dict[str, PrunableLinear]:
    chosen = {
        name: linear
        for name, linear in every.items()
        if (targets is None or any(matches(name, pattern) for pattern in targets))
        and not any(matches(name, pattern) or matches(_parent(linear), pattern) for pattern in ignore)
    }
    if not chosen:
        raise InputError(
            f"`pruning.targets` and `pruning.ignore` leave nothing to prune in block {index} of {_some(every)}."
        )
    return chosen


def _parent(linear: PrunableLinear) -> str:
    """The path of the module of fused experts that ``linear`` is a slice of; its own name for any other."""
    return linear.name.rsplit(".", 2)[0] if isinstance(linear, ExpertSlice) else linear.name


def _some(names: Collection[str]) -> str:
    """The names in one line; of a layer's experts only those of the first."""
    return ", ".join(name for name in names if re.search(r"\.[1-9]\d*\.", name) is None)


def matches(name: str, pattern: str) -> bool:
    """Returns whether ``pattern`` is the whole of ``name``, a dotted suffix of it, or a regular expression for it.

    >>> matches("self_attn.q_proj", "q_proj"), matches("mlp.up_proj", r"mlp\\..*"), matches("mlp.up_proj", "proj")
    (True, True, False)
    """
    return name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) is not None
