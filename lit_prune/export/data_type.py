"""The data type of the exported weights, which may be another than the one that the model was trained in.

Training in float32 does not make a model of bfloat16 files worth twice the bytes. So a model that was loaded in a wider
type than that of its files is written in the files' type, unless the settings say otherwise. The last perplexity of a
run is that of the weights that were written, computed in the type of the run.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.models.files.gguf_file import stored_type
from lit_prune.models.files.mappable import headers
from lit_prune.models.on_disk import on_disk
from lit_prune.models.quantised import convert
from lit_prune.recover.merge import sharing_weights

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def stored_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """Returns the data type of most bytes in the files that ``model`` was loaded from.

    These are safetensors, or a .gguf file; None is returned without any, and for a quantised .gguf file. They are found
    by the model's `name_or_path`.
    """
    sizes: Counter[torch.dtype] = Counter()
    try:
        if (file := Path(model.name_or_path or "")).suffix == ".gguf":
            return stored_type(file)
        stored = headers(model.name_or_path, local_only=True) if model.name_or_path else {}
    except (OSError, ValueError, SafetensorError):  # moved away, or never on this machine
        return None
    for header in stored.values():
        if header.dtype in TYPES.values():
            sizes[header.dtype] += torch.Size(header.shape).numel() * header.dtype.itemsize
    return sizes.most_common(1)[0][0] if sizes else None


def export_dtype(model: PreTrainedModel, requested: str | None, stored: torch.dtype | None) -> torch.dtype:
    """Returns the data type in which ``model`` is to be written.

    Args:
        model: The model in memory.
        requested: Name of the data type; None is that of the files if the model is in a wider one, or else the model's.
        stored: Data type of the files, see :func:`stored_dtype`.

    Raises:
        InputError: for a ``requested`` type other than that of a model whose weights stay on disk.
    """
    if requested is None:
        return stored if stored is not None and stored.itemsize < model.dtype.itemsize else model.dtype
    if on_disk(model) is not None and TYPES[requested] != model.dtype:
        raise InputError(
            f"`export.dtype` must be null with `model.on_disk`, whose weights are never converted, got {requested}."
        )
    return TYPES[requested]


def converted(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a copy of a model without an adapter in ``dtype``, see ``quantised.convert``; ``model`` is not changed.

    Raises:
        InputError: for a weight that is too large for ``dtype``.
    """
    copy = sharing_weights(model)
    convert(copy, dtype)
    for name, tensor in copy.state_dict().items():
        if dtype == torch.float16 and tensor.dtype == dtype and not tensor.isfinite().all():
            raise InputError(
                f"`export.dtype` must be bfloat16 or float32, got float16, which is too small for values of {name}: "
                "give it to `lit-prune export` with the run's checkpoint."
            )
    return copy
