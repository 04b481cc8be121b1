"""Reads a .gguf file that lit_prune wrote, to verify it.

The names of the tensors and the order of the rows of q and k are llama.cpp's; the config is the Hugging Face config in
the file's metadata. transformers reads .gguf files too, but it takes the config from llama.cpp's fields, which lack
some of it, and reads Mistral as Llama.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

CONFIG = "lit_prune.config"  # key of the Hugging Face config, as JSON, in the file's metadata
# In these architectures llama.cpp rotates neighbouring rows of q and k, where Hugging Face rotates rows i and
# i + head_dim / 2; the converter reorders them.
INTERLEAVED = ("deci", "granite", "llama", "olmo", "smollm3")
DTYPES = {0: torch.float32, 1: torch.float16, 32: torch.bfloat16}  # by llama.cpp's number of the type of the matrices


def read_model(file: Path) -> PreTrainedModel:
    """Returns the model in ``file``, in the type of its matrices; float32 for quantised ones."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    dtype = DTYPES.get(reader.fields["general.file_type"].contents(), torch.float32)
    config = AutoConfig.for_model(**json.loads(reader.fields[CONFIG].contents()))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in _weights(reader, model):
            model.get_parameter(name).copy_(weight)
    return model


def head_dim(config: Any) -> int:
    """Returns the number of dimensions of a head, which not every config has explicitly."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _weights(reader: Any, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields each parameter's name and its values in the file, dequantised and in the order of Hugging Face."""
    import gguf

    architecture = reader.fields["general.architecture"].contents()
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, _ in model.named_parameters():
        tensor = stored[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())  # the file is read-only
        if architecture in INTERLEAVED and any(f".{part}_proj." in name for part in "qk"):
            weight = _halves(weight, head_dim(model.config))
        yield name, weight


def _halves(rows: Tensor, head_dim: int) -> Tensor:
    """Returns rows of q or k, interleaved within each head, as first and second half of each head.

    Rows 0, 2, 1, 3 of a head of 4 dimensions become 0, 1, 2, 3.
    """
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)
