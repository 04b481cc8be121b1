"""Reads .gguf files: those that lit_prune wrote exactly, others as far as transformers does.

The names of the tensors and the order of the rows of q and k are llama.cpp's. A file of lit_prune has the Hugging Face
config in its metadata. For other files transformers makes one of llama.cpp's fields, which lacks some of it: scaled
rotary embeddings and biases. Such files are refused, as they would open as another model.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer

from lit_prune.errors import InputError
from lit_prune.models.families import head_dim

CONFIG = "lit_prune.config"  # key of the Hugging Face config, as JSON, in the file's metadata
# In these architectures llama.cpp rotates neighbouring rows of q and k, where Hugging Face rotates rows i and
# i + head_dim / 2; the converter reorders them.
INTERLEAVED = ("deci", "granite", "llama", "olmo", "smollm3")
DTYPES = {0: torch.float32, 1: torch.float16, 32: torch.bfloat16}  # by llama.cpp's number of the type of the matrices
SCALED = "gpt-oss"  # the one architecture whose scaled rotary embeddings transformers reads
BIAS = re.compile(r"blk\.\d+\.(attn|ffn)_\w+\.bias")


def read_config(file: Path) -> PreTrainedConfig:
    """Returns the config of the model in ``file``.

    Raises:
        InputError: for a damaged file, without the package gguf, and for a file whose architecture or scaling of rotary
            embeddings transformers does not read.
    """
    return _config(file, _reader(file))


def read_model(file: Path, dtype: torch.dtype | None = None, attn_implementation: str | None = None) -> PreTrainedModel:
    """Returns the model in ``file``, in eval mode.

    Args:
        file: The file.
        dtype: Data type of the weights; None is that of the matrices in a file of lit_prune, float32 for 8 bits, and
            float32 for all other files.
        attn_implementation: As for ``from_pretrained``.

    Raises:
        InputError: as :func:`read_config`, and for weights that transformers does not read.
    """
    reader = _reader(file)
    config = _config(file, reader)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if not _is_ours(reader):
        return _read_by_transformers(file, reader, {**options, "dtype": dtype or torch.float32})
    stored = DTYPES.get(reader.fields["general.file_type"].contents(), torch.float32)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or stored, **options).eval()
    model.name_or_path = str(file.parent)
    with torch.no_grad():
        for name, weight in _weights(reader, model):
            model.get_parameter(name).copy_(weight)
    return model


def read_tokenizer(file: Path) -> Tokenizer:
    """Returns the tokenizer in ``file``, as transformers builds it from llama.cpp's fields.

    Raises:
        InputError: as :func:`read_config`.
    """
    reader = _reader(file)
    _config(file, reader)
    # FastTokenizer reads files of any architecture, as the kind of the vocabulary is in them
    kind = FastTokenizer if _is_ours(reader) else AutoTokenizer
    return kind.from_pretrained(file.parent, gguf_file=file.name)


def _reader(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError(
            f"`model.pretrained` needs the package gguf to read {file}. Install it by: pip install 'lit-prune[gguf]'."
        ) from error
    try:
        return GGUFReader(file)
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise InputError(
            f"`model.pretrained` {str(file)!r} cannot be loaded: it is damaged ({error}): download or copy it again."
        ) from error


def _text(reader: Any, key: str) -> str | None:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _is_ours(reader: Any) -> bool:
    return CONFIG in reader.fields


def _config(file: Path, reader: Any) -> PreTrainedConfig:
    """Returns the Hugging Face config in the metadata, or one that transformers makes of llama.cpp's fields."""
    if _is_ours(reader):
        import lit_prune.models.remote_code.modeling_shrunk  # noqa: F401 (registers its classes)

        return AutoConfig.for_model(**json.loads(reader.fields[CONFIG].contents()))
    architecture = _text(reader, "general.architecture")
    scaling = _text(reader, f"{architecture}.rope.scaling.type")
    factors = any(tensor.name.startswith(("rope_freqs", "rope_factors")) for tensor in reader.tensors)
    if architecture != SCALED and (factors or scaling not in (None, "none")):
        raise _unread(file, "scaled rotary embeddings")
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, LookupError) as error:
        raise _unread(file, f"the architecture `{architecture}`") from error


def _unread(file: Path, part: str) -> InputError:
    return InputError(
        f"`model.pretrained` must be a .gguf file that transformers reads, got {file} with {part}, which it does not: "
        "give the Hugging Face folder that the file was made from."
    )


def _read_by_transformers(file: Path, reader: Any, options: dict[str, Any]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
    has_biases = any(name.endswith(".bias") for name, _ in model.named_parameters())
    if not has_biases and any(BIAS.fullmatch(tensor.name) for tensor in reader.tensors):
        raise _unread(file, "biases")
    return _plain(model)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of ``model`` without the file's quantization_config, which prevents saving it."""
    dropped = {"quantization_config", "transformers_version", "architectures", "model_type", "_name_or_path"}
    fields = {key: value for key, value in model.config.to_dict().items() if key not in dropped}
    attention = model.config._attn_implementation
    plain = AutoModelForCausalLM.from_config(
        type(model.config)(**fields), dtype=model.dtype, attn_implementation=attention
    )
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.name_or_path = model.name_or_path
    return plain.eval()


def _weights(reader: Any, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields each parameter's name and its values in the file, dequantised and in the order of Hugging Face."""
    import gguf

    architecture = _text(reader, "general.architecture")
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
