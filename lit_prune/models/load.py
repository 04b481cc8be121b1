"""Loads an LLM, its config and its tokenizer from a hub id, a folder, a .gguf file, or ``embedded``.

A name that does not exist is refused at once. transformers itself would look for a mistyped folder on the hub for a
minute and end in several chained tracebacks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lit_prune.errors import InputError, near_misses
from lit_prune.files import cache_error
from lit_prune.models.custom_code import custom_code_error
from lit_prune.models.files.gguf_file import read_config, read_model, read_tokenizer
from lit_prune.models.files.mappable import check_mappable
from lit_prune.models.on_disk import keep_on_disk
from lit_prune.models.quantised import convert, device_map, make_loadable, quantisation, unquantised

EMBEDDED = Path(__file__).parent / "embedded"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_TIMEOUT_SECONDS = 10
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load_config(pretrained: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Returns the Hugging Face config of ``pretrained`` without loading weights, except those of a .gguf file.

    Args:
        pretrained: A hub id, a folder, a .gguf file, or `embedded`.
        trust_remote_code: Run the custom code of the model, if it has any.

    Raises:
        InputError: if ``pretrained`` does not exist or is not a model, if the hub cannot be reached, or for custom code
            that is not trusted.
    """
    source = locate(pretrained)
    if isinstance(source, Path):
        return read_config(source)
    config = _checked(AutoConfig.from_pretrained, source, "config.json", trust_remote_code)
    method = str((getattr(config, "quantization_config", None) or {}).get("quant_method"))
    if "fp8" in method:
        raise InputError(
            f"`model.pretrained` must not be stored in FP8 ({method}), which can neither be pruned nor trained, got "
            f"{pretrained!r}: load it once with transformers' `FineGrainedFP8Config(dequantize=True)`, and write it by "
            "`save_pretrained`."
        )
    return config


def load_model(
    pretrained: str,
    dtype: Dtype = "auto",
    attn_implementation: str | None = None,
    on_disk: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Returns the causal LM ``pretrained`` on the CPU, in eval mode.

    Args:
        pretrained: A hub id, a folder, a .gguf file (dequantised, so that it can be trained and saved), or `embedded`.
        dtype: Data type of the weights; `auto` is the one they are stored in.
        attn_implementation: `sdpa`, `eager`, ...; None is the default of transformers.
        on_disk: Leave the weights in their files, see ``models.on_disk``.
        trust_remote_code: Run the custom code of the model, if it has any.

    Raises:
        InputError: if ``pretrained`` does not exist or is not a model, if the hub cannot be reached, or for custom code
            that is not trusted; with ``on_disk``, if the weights are not stored in the shapes and the data type that
            the model needs.
    """
    source = locate(pretrained)
    if isinstance(source, Path):
        if on_disk:
            raise InputError(
                f"`model.on_disk` must be false for the .gguf file {pretrained}, which is dequantised in memory: write "
                "it as safetensors first, by `save_pretrained`."
            )
        torch_dtype = None if dtype == "auto" else getattr(torch, dtype)
        return read_model(source, torch_dtype, attn_implementation)
    config = load_config(pretrained, trust_remote_code)
    options = device_map(config, "cpu")  # also refuses what can only be loaded
    if on_disk:
        _check_on_disk(source, config, dtype, trust_remote_code)
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    if attn_implementation is not None:
        options = {**options, "attn_implementation": attn_implementation}
    loader = partial(AutoModelForCausalLM.from_pretrained, dtype=torch_dtype, **options)
    model = _checked(loader, source, "config.json", trust_remote_code)
    make_loadable(model)
    if isinstance(torch_dtype, torch.dtype) and quantisation(model) is not None:
        convert(model, torch_dtype)
    return keep_on_disk(model) if on_disk else model


def _check_on_disk(source: str, config: PreTrainedConfig, dtype: Dtype, trust_remote_code: bool) -> None:
    try:
        check_mappable(source, config, None if dtype == "auto" else getattr(torch, dtype), trust_remote_code)
    except (OSError, SafetensorError) as error:
        raise InputError(f"`model.pretrained` {source!r} cannot be loaded: {_first_line(error)}") from error


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Tokenizer:
    """Returns the tokenizer of ``name``: a hub id, a folder, a .gguf file, or `embedded`.

    Args:
        name: The model that has the tokenizer.
        trust_remote_code: Run the custom code of the tokenizer, if it has any.

    Raises:
        InputError: if ``name`` has none, if the hub cannot be reached, or for custom code that is not trusted.
    """
    source = locate(name)
    if isinstance(source, Path):
        return read_tokenizer(source)
    return _checked(AutoTokenizer.from_pretrained, source, "tokenizer_config.json", trust_remote_code)


def new_model(architecture: dict[str, Any], dtype: Dtype = "float32") -> PreTrainedModel:
    """Returns a freshly initialised causal LM from the fields of a Hugging Face config.

    Args:
        architecture: `model_type`, and the fields of its config that differ from the defaults.
        dtype: Data type of the weights; `auto` is float32.

    Raises:
        InputError: if `model_type` is missing or unknown to transformers.
    """
    config = architecture_config(architecture)
    torch_dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForCausalLM.from_config(config, dtype=torch_dtype)


def skeleton(
    config: PreTrainedConfig, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Returns the causal LM of a config on the meta device, with modules and shapes but without weights.

    Args:
        config: The config, which is not changed.
        attn_implementation: `sdpa`, `eager`, ...; None is the default of transformers.
        trust_remote_code: Run the custom code of the model, if it has any.

    Raises:
        InputError: if transformers has no causal LM for it, or not with that attention implementation.
    """
    plain, options = unquantised(config), {"trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plain, **options)
    except ValueError as error:
        raise InputError(f"`model.pretrained` is no causal LM that transformers knows: {_first_line(error)}") from error
    if attn_implementation is None:
        return model
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(plain, attn_implementation=attn_implementation, **options)
    except (ImportError, OSError, ValueError) as error:
        raise InputError(
            f"`model.attn_implementation` must be one that runs here, got {attn_implementation!r}: "
            f"{_first_line(error).rstrip('.')}. Leave it out for the default of transformers."
        ) from error


def architecture_config(architecture: dict[str, Any]) -> PreTrainedConfig:
    """Returns the Hugging Face config that ``architecture`` describes; see :func:`new_model`."""
    fields = dict(architecture)
    try:
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except KeyError as error:
        raise InputError("`model.architecture` must have a `model_type`, such as llama.") from error
    except ValueError as error:
        raise InputError(f"`model.architecture` is no config that transformers knows: {_first_line(error)}") from error


def locate(pretrained: str) -> str | Path:
    """Returns the path of the .gguf file that ``pretrained`` is, or the folder or hub id for ``from_pretrained``.

    Raises:
        InputError: if ``pretrained`` looks like a path and does not exist, or the hub cannot be reached.
    """
    if pretrained == "embedded":
        return str(EMBEDDED)
    path = Path(pretrained).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        return str(path)
    if path.exists():
        raise InputError(f"`model.pretrained` must be a folder, a .gguf file or a hub id, got the file {pretrained}.")
    if _looks_like_path(pretrained):
        raise InputError(f"`model.pretrained` must exist, got {pretrained!r}: no such file or folder.")
    _check_hub(pretrained)
    return pretrained


def _looks_like_path(name: str) -> bool:
    return (
        not HUB_ID.fullmatch(name)
        or name.endswith(".gguf")
        or name.startswith((".", "~", os.sep))
        or ("/" in name and Path(name).parent.is_dir())
    )


def _check_hub(repo: str) -> None:
    """Raises InputError unless ``repo`` is in the local cache or on the hub, with one request at most."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(repo, "config.json"), str):
            return
    except HFValidationError as error:
        raise InputError(
            f"`model.pretrained` must be a folder, a .gguf file or a hub id: there is no folder {repo!r} here, and no "
            "model on the hub can be named so."
        ) from error
    if "/" not in repo and near_misses(repo, ["embedded"]):
        raise InputError(f"`model.pretrained`: there is no model {repo!r} here. Did you mean embedded?")
    remedy = "pass a local folder or a .gguf file, or run once with a connection so that the hub's cache has it"
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"`model.pretrained`: {repo!r} is not in the hub's cache and HF_HUB_OFFLINE is set; {remedy}.")
    try:
        HfApi().model_info(repo, timeout=HUB_TIMEOUT_SECONDS)
    except RepositoryNotFoundError as error:
        raise InputError(
            f"`model.pretrained` must be a folder, a .gguf file or a hub id: there is no folder {repo!r} here and no "
            "such model on the hub (a private or gated one needs `hf auth login`)."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        answer = InputError(f"`model.pretrained`: the hub answered {_first_line(error)!r} for {repo!r}; {remedy}.")
        raise cache_error(error) or answer from error
    except Exception as error:  # the http library's own connection errors share no base with OSError
        raise InputError(
            f"`model.pretrained`: there is no folder {repo!r} here, and the hub cannot be reached to look for it there "
            f"({_first_line(error)}); {remedy}."
        ) from error


def _checked(loader: Callable[..., Any], source: str, needed: str, trust_remote_code: bool) -> Any:
    """Calls a ``from_pretrained`` and returns its result; its errors become InputErrors of one line."""
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, needed)):
        hint = _model_within(Path(source), needed)
        raise InputError(
            f"`model.pretrained` must be a Hugging Face model folder, got {source!r}: it has no {needed}.{hint}"
        )
    try:
        return loader(source, trust_remote_code=trust_remote_code)  # None would ask on a terminal
    except ImportError as error:
        raise InputError(f"`model.pretrained`: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise custom_code_error(source) from error
        if (unwritable := cache_error(error)) is not None:
            raise unwritable from error
        if (damaged := _damaged_file(Path(source))) is not None:
            raise InputError(
                f"`model.pretrained` {source!r} cannot be loaded: {damaged}: download or copy that file again."
            ) from error
        raise InputError(f"`model.pretrained` {source!r} cannot be loaded: {_first_line(error)}") from error


def _model_within(folder: Path, needed: str) -> str:
    """Returns where the model is, for a folder that has a .gguf file, or that of a run, which has it in `model`."""
    for inner in (folder, folder / "model"):
        if (inner / needed).is_file():
            return f" Did you mean {inner}?"
        if files := sorted(inner.glob("*.gguf")):
            return f" Did you mean {' or '.join(str(file) for file in files)}?"
    return ""


def _damaged_file(folder: Path) -> str | None:
    """The first file of weights in ``folder`` that is missing or cannot be opened, and which of both it is."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = {file.name for file in folder.glob("*.safetensors")} if folder.is_dir() else set()
    if index.is_file():
        names |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in sorted(names):
        if not (folder / name).exists():
            return f"{name} is missing"
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            return f"{name} is damaged ({_first_line(error)})"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
