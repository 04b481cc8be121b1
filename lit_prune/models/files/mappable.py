"""Checks that the weights of a model can be views of its memory-mapped safetensors, by the files' headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

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
    """Shape and data type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def headers(source: str, *, local_only: bool = False) -> dict[str, Header]:
    """Returns the headers of all tensors in the safetensors of a folder or hub id, by name; empty if it has none.

    Args:
        source: A folder or hub id.
        local_only: Read files in the hub's cache only, without a request to the hub.
    """
    tensors = {}
    for file in _files(source, local_only):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                tensor = opened.get_tensor(name)  # a view of the mapped file: nothing is read
                tensors[name] = Header(tuple(tensor.shape), tensor.dtype)
    return tensors


def _files(source: str, local_only: bool) -> list[Path]:
    """Returns the files that transformers loads: a single one, or those of the index; empty if there are none."""
    options: dict[str, Any] = {"local_files_only": local_only}
    single = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **options)
    if single is not None:
        return [Path(single)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **options)
    return [] if index is None else [Path(file) for file in get_checkpoint_shard_files(source, index, **options)[0]]


def check_mappable(
    source: str, config: PreTrainedConfig, dtype: torch.dtype | None, trust_remote_code: bool = False
) -> None:
    """Checks that every matrix of a model is stored in the shape and data type in which the model computes.

    Only then can it be a view of the file. Vectors (norms, biases) may have another data type: they are small, so
    converting them in memory costs nothing.

    Args:
        source: A folder or hub id.
        config: The model's config.
        dtype: Requested data type; None is that of the config, or else the stored one.
        trust_remote_code: Run the custom code of the model, if it has any.

    Raises:
        InputError: if transformers would have to convert a matrix in memory.
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
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    by_model_name = _renamed(stored, model)
    for names, parameter in _matrices(model):
        matching = [by_model_name[name] for name in names if name in by_model_name]
        if not matching or matching[0].shape != tuple(parameter.shape):
            raise InputError(
                f"`model.on_disk` must be false for {source!r}: its safetensors have no {names[0]} of the shape that "
                f"the model needs, transformers converts other tensors to it in memory ({config.model_type})."
            )
        if matching[0].dtype != wanted:
            actual = str(matching[0].dtype).removeprefix("torch.")
            raise InputError(
                f"`model.dtype` must be {actual} with `model.on_disk`, the type that {names[0]} is stored in, got "
                f"{str(wanted).removeprefix('torch.')}: converting it takes memory. Pass `--model.dtype {actual}`, or "
                "`--model.on_disk false`."
            )


def _renamed(stored: dict[str, Header], model: PreTrainedModel) -> dict[str, Header]:
    """Returns the stored tensors by their names in the model, without those that transformers converts."""
    transforms, expected = get_model_conversion_mapping(model), model.state_dict()
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamed = {}
    for name, tensor in stored.items():
        new_name, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if new_name not in expected and name in expected:  # the rule is for another layout of the family
            new_name, converted = name, None
        if converted is None:
            renamed[new_name] = tensor
    return renamed


def _matrices(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Returns the parameters of two or more dimensions, each with all its names, of which tied weights have several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim > 1:
            names.setdefault(parameter, []).append(name)
    return [(all_names, parameter) for parameter, all_names in names.items()]
