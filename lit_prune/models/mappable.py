"""What the safetensors of a model hold, by their headers alone, and whether the model can be views of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from lit_prune.errors import InputError


class Header(NamedTuple):
    """The shape and the type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def headers(source: str) -> dict[str, Header]:
    """Returns what the safetensors of a folder or hub id hold, by name; empty where there are none."""
    found = {}
    for file in _files(source):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                tensor = opened.get_tensor(name)  # a view of the mapped file: nothing is read
                found[name] = Header(tuple(tensor.shape), tensor.dtype)
    return found


def _files(source: str) -> list[Path]:
    """The files that transformers takes: one, or those that an index names."""
    single = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [Path(single)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    return [] if index is None else [Path(file) for file in get_checkpoint_shard_files(source, index)[0]]


def check_mappable(source: str, config: PreTrainedConfig, dtype: torch.dtype | None) -> None:
    """Asks whether every matrix of a model stands in its files just as it is needed, so that it can be a view of them.

    Vectors (norms, biases) may be of another type: they are small, and are converted in memory.

    Args:
        source: A folder or hub id.
        config: The model's config.
        dtype: The type that is asked for; None is the config's, or the stored one.

    Raises:
        InputError: where transformers would convert matrices as it loads, which takes memory.
    """
    stored = headers(source)
    if not stored:
        raise InputError(
            f"`model.on_disk` must be false for {source!r}, which has no safetensors: load it in memory once, and "
            "write them by `save_pretrained`."
        )
    first = next(tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point)
    wanted = dtype or config.dtype or first
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    as_they_are = _renamed(stored, model)
    for names, parameter in _matrices(model):
        found = [as_they_are[name] for name in names if name in as_they_are]
        if not found or found[0].shape != tuple(parameter.shape):
            raise InputError(
                f"`model.on_disk` must be false for {source!r}: {names[0]} does not stand in its safetensors as it is, "
                f"transformers makes it from what does ({config.model_type}), which takes memory."
            )
        if found[0].dtype != wanted:
            told = str(found[0].dtype).removeprefix("torch.")
            raise InputError(
                f"`model.dtype` must be {told} with `model.on_disk`, the type that {names[0]} is stored in, got "
                f"{str(wanted).removeprefix('torch.')}: converting it takes memory. Pass `--model.dtype {told}`, or "
                "`--model.on_disk false`."
            )


def _renamed(stored: dict[str, Header], model: PreTrainedModel) -> dict[str, Header]:
    """What is stored, by the names that transformers gives it; without what it makes other tensors from."""
    transforms, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found = {}
    for name, tensor in stored.items():
        own, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if own not in known and name in known:
            own, converted = name, None
        if converted is None:
            found[own] = tensor
    return found


def _matrices(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """The parameters of two dimensions and more, each with all its names: tied weights have several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim > 1:
            names.setdefault(parameter, []).append(name)
    return [(found, parameter) for parameter, found in names.items()]
