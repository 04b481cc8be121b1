"""Reads .gguf files: those that lit_prune wrote exactly, others as far as transformers does.

The names of the tensors and the order of the rows of q and k are llama.cpp's. A file of lit_prune has the Hugging Face
config and the files of the tokenizer in its metadata. For other files transformers makes both of llama.cpp's fields,
which lack some of it: scaled rotary embeddings and biases. Such files are refused, as they would open as another model.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.errors import InputError
from lit_prune.models.families import head_dim

# keys of the file's metadata, both JSON: the Hugging Face config, and the tokenizer's files by their names
CONFIG, TOKENIZER = "lit_prune.config", "lit_prune.tokenizer"
TOKENIZER_FILES = ("*.json", "*.jinja")
# In these architectures llama.cpp rotates neighbouring rows of q and k, where Hugging Face rotates rows i and
# i + head_dim / 2; the converter reorders them.
INTERLEAVED = ("deci", "granite", "llama", "olmo", "smollm3")
DTYPES = {0: torch.float32, 1: torch.float16, 32: torch.bfloat16}  # by llama.cpp's number of the type of the matrices
SCALED = "gpt-oss"  # the one architecture whose scaled rotary embeddings transformers reads
BIAS = re.compile(r"blk\.\d+\.(attn|ffn)_\w+\.bias")


def read_config(file: Path) -> PreTrainedConfig:
    """Returns the config of the model in ``file``.

    Raises:
        InputError: for a damaged file and a part of a model, without the package gguf, and for a file whose
            architecture or scaling of rotary embeddings transformers does not read.
    """
    with _checked(file) as reader:
        return _config(file, reader)


def read_model(file: Path, dtype: torch.dtype | None = None, attn_implementation: str | None = None) -> PreTrainedModel:
    """Returns the model in ``file``, in eval mode.

    Args:
        file: The file.
        dtype: Data type of the weights; None is that of the config, see :func:`read_config`: that of the matrices in a
            file of lit_prune, or float32 for 8 bits, and float32 for all other files.
        attn_implementation: As for ``from_pretrained``.

    Raises:
        InputError: as :func:`read_config`, and for weights that transformers does not read.
    """
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _checked(file) as reader:
        config = _config(file, reader)
        options["dtype"] = dtype or config.dtype
        if _is_ours(reader):
            model = AutoModelForCausalLM.from_config(config, **options).eval()
            with torch.no_grad():
                for name, weight in _weights(file, reader, model):
                    model.get_parameter(name).copy_(weight)
        else:
            model = _read_by_transformers(file, reader, options)
    model.name_or_path = str(file)
    return model


def read_tokenizer(file: Path) -> Tokenizer:
    """Returns the tokenizer in ``file``: the exported one, or what transformers builds from llama.cpp's fields.

    Raises:
        InputError: as :func:`read_config`, and for a vocabulary that transformers does not read.
    """
    with _checked(file) as reader:
        if (contents := _value(reader, TOKENIZER)) is not None:
            return _stored_tokenizer(file, json.loads(contents))
        _config(file, reader)
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def stored_type(file: Path) -> torch.dtype | None:
    """Returns the data type of the matrices in ``file``; None for quantised ones."""
    with _checked(file) as reader:
        return DTYPES.get(_value(reader, "general.file_type"))


def tokenizer_metadata(tokenizer: Tokenizer) -> str:
    """Returns what :func:`read_tokenizer` makes the same tokenizer of: its files by their names, as JSON."""
    contents: dict[str, Any] = {}
    with TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for file in sorted(file for pattern in TOKENIZER_FILES for file in Path(temporary).glob(pattern)):
            text = file.read_text(encoding="utf-8")
            contents[file.name] = json.loads(text) if file.suffix == ".json" else text
    return json.dumps(contents, ensure_ascii=False)


def _stored_tokenizer(file: Path, contents: dict[str, Any]) -> Tokenizer:
    with TemporaryDirectory() as temporary:
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (Path(temporary) / Path(name).name).write_text(text, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(temporary, trust_remote_code=False)
    tokenizer.name_or_path = str(file)
    return tokenizer


@contextmanager
def _checked(file: Path) -> Iterator[Any]:
    """Gives a reader of ``file``; all errors become InputErrors of one line."""
    try:
        from gguf import GGUFReader  # noqa: F401 (whether it is installed)
    except ImportError as error:
        raise InputError(
            f"`model.pretrained` needs the package gguf to read {file}. Install it by: pip install 'lit-prune[gguf]'."
        ) from error
    try:
        status = file.stat()
        reader = _reader(file, (status.st_ino, status.st_size, status.st_mtime_ns))
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise InputError(
            f"`model.pretrained` {str(file)!r} cannot be loaded: it is damaged ({error}): download or copy it again."
        ) from error
    if (parts := _value(reader, "split.count", 0)) > 1:
        raise InputError(
            f"`model.pretrained` must be a whole model, got {file}, which is one of {parts} parts: put them together "
            "by llama.cpp's `llama-gguf-split --merge`."
        )
    try:
        yield reader
    except InputError:
        raise
    except (OSError, ValueError, LookupError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"`model.pretrained` {str(file)!r} cannot be loaded: {reason}") from error


@lru_cache(maxsize=1)  # a large vocabulary takes seconds, and a command needs config, weights and tokenizer
def _reader(file: Path, version: tuple[int, ...]) -> Any:
    from gguf import GGUFReader

    return GGUFReader(file)


def _value(reader: Any, key: str, default: Any = None) -> Any:
    """Returns the text or number of a key of the metadata, or ``default`` if it is not there."""
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _is_ours(reader: Any) -> bool:
    return CONFIG in reader.fields


def _config(file: Path, reader: Any) -> PreTrainedConfig:
    """Returns the Hugging Face config in the metadata, or one that transformers makes of llama.cpp's fields."""
    if _is_ours(reader):
        import lit_prune.models.remote_code.modeling_shrunk  # noqa: F401 (registers its classes)

        config = AutoConfig.for_model(**json.loads(reader.fields[CONFIG].contents()))
        config.dtype = DTYPES.get(_value(reader, "general.file_type"), torch.float32)
        return config
    architecture = _value(reader, "general.architecture")
    scaling = _value(reader, f"{architecture}.rope.scaling.type")
    factors = any(tensor.name.startswith(("rope_freqs", "rope_factors")) for tensor in reader.tensors)
    if architecture != SCALED and (factors or scaling not in (None, "none")):
        raise _unread(file, "scaled rotary embeddings")
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, LookupError) as error:
        raise _unread(file, f"the architecture `{architecture}`") from error
    config.dtype = torch.float32
    return config


def _unread(file: Path, part: str) -> InputError:
    return InputError(
        f"`model.pretrained` must be a .gguf file that transformers reads, got {file} with {part}, which it does not: "
        "give the Hugging Face folder that the file was made from."
    )


def _read_by_transformers(file: Path, reader: Any, options: dict[str, Any]) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, output_loading_info=True, **options
    )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would leave random weights
        raise _incomplete(file, missing[0])
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
    return plain.eval()


def _incomplete(file: Path, name: str) -> InputError:
    return InputError(
        f"`model.pretrained` {str(file)!r} cannot be loaded: it has no {name}: download or copy it again."
    )


def _weights(file: Path, reader: Any, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields each parameter's name and its values in the file, dequantised and in the order of Hugging Face."""
    import gguf

    architecture = _value(reader, "general.architecture")
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, _ in model.named_parameters():
        tensor = stored.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if tensor is None:
            raise _incomplete(file, name)
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())  # the file is read-only
        if architecture in INTERLEAVED and any(f".{part}_proj." in name for part in "qk"):
            weight = _halves(weight, head_dim(model.config))
        yield name, weight


def _halves(rows: Tensor, head_dim: int) -> Tensor:
    """Returns rows of q or k, interleaved within each head, as first and second half of each head.

    Rows 0, 2, 1, 3 of a head of 4 dimensions become 0, 1, 2, 3.
    """
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)
