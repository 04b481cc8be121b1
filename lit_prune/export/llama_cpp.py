"""llama.cpp's converter of Hugging Face folders to .gguf, in the copy that the package auto-round contains.

llama.cpp's own release of it is a script and a folder of modules, `conversion`, which cannot be installed; auto-round
has that folder unchanged. The modules are loaded from there, because importing auto-round takes seconds and patches
transformers.

A model with blocks of different sizes is written as llama.cpp's architecture `deci`, whose fields are lists with one
value a block. The converter knows it for the published models of that name, with few sizes; here it is the converter of
Llama that writes it.

A .gguf file names the pre-tokenizer of a byte-level BPE vocabulary. The converter finds the name by a hash of encoded
text, which it knows for published models only; for other vocabularies ``PRE_TOKENIZERS`` has the name by the rules.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import CONFIG_NAME

from lit_prune.errors import InputError
from lit_prune.models.on_disk import save

OutType = Literal["f32", "f16", "bf16", "q8_0"]
FILE_TYPES: dict[OutType, str] = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
PACKAGES = ("gguf", "auto_round")
INSTALL = "pip install 'lit-prune[gguf]'"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of pre-tokenizers, by their rules in tokenizer.json
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [DIGITS, BYTE_LEVEL],
    "qwen2": [
        {"type": "NFC"},
        {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False},
        {**BYTE_LEVEL, "use_regex": False},
    ],
}


def check_packages() -> None:
    """Raises InputError if gguf or auto-round is not installed."""
    missing = [name.replace("_", "-") for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"`format` GGUF needs the package {' and '.join(missing)}. Install it by: {INSTALL}.")


def check_vocabulary(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Converts the config and the vocabulary alone, without weights and without writing a file.

    Args:
        model: The model; it may be on the meta device.
        tokenizer: Its tokenizer.

    Raises:
        InputError: for a class that llama.cpp has no converter for, and a vocabulary that its converter does not
            support.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        (folder / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        tokenizer.save_pretrained(folder)
        converter = _converter(folder, tokenizer, folder / "vocabulary.gguf", "f32")
        try:
            converter.prepare_metadata(vocab_only=True)
        except Exception as error:  # the converter raises whatever happens to fail
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                "`format` GGUF must have a model and a tokenizer that llama.cpp's converter supports, got "
                f"{type(model).__name__} with {type(tokenizer).__name__} ({reason})."
            ) from error


def convert(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    file: Path,
    outtype: OutType,
    *,
    name: str,
    metadata: Mapping[str, str],
) -> None:
    """Writes ``model`` and its tokenizer to a .gguf file, through a temporary Hugging Face folder beside the file.

    Args:
        model: The model, in full precision and without an adapter.
        tokenizer: Its tokenizer.
        file: Path of the file.
        outtype: Type of the matrices; vectors are always stored as f32, and matrices whose rows are not multiples of 32
            as f16 instead of q8_0.
        name: Name of the model in the file.
        metadata: Texts that are added to the file's metadata, by key.
    """
    # beside the file and not in the system's temporary folder, which may be too small for the weights
    with TemporaryDirectory(prefix=".huggingface-", dir=file.parent) as temporary:
        folder = Path(temporary) / name  # the converter reads further fields, such as the size, from this name
        folder.mkdir()
        save(model, folder)
        tokenizer.save_pretrained(folder)
        converter = _converter(folder, tokenizer, file, outtype, name)
        with torch.inference_mode():
            converter.prepare_tensors()
            converter.prepare_metadata(vocab_only=False)
            writer = converter.gguf_writer
            for key, text in metadata.items():
                writer.add_string(key, text)
            writer.write_header_to_file(path=file)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()


def _converter(folder: Path, tokenizer: Tokenizer, file: Path, outtype: OutType, name: str | None = None) -> Any:
    """Returns llama.cpp's converter of a Hugging Face folder, which writes nothing yet."""
    import gguf

    sizes, architecture = _adapted(folder / CONFIG_NAME)
    try:
        kind = _conversion().get_model_class(architecture)
    except NotImplementedError as error:
        raise InputError(
            f"`format` GGUF must have a model that llama.cpp has a converter for, got {architecture}: use HuggingFace."
        ) from error
    except (AttributeError, ImportError) as error:
        raise InputError(
            f"`format` GGUF needs versions of gguf and auto-round that go together ({error}). Install them: {INSTALL}."
        ) from error
    if sizes:
        kind = _by_block(kind, sizes)
    converter = kind(folder, getattr(gguf.LlamaFileType, FILE_TYPES[outtype]), file, model_name=name)
    # the converter passes a tokenizer that it loads itself, which for a vocabulary of one's own may be of another class
    converter.get_vocab_base_pre = lambda _: _pre_tokenizer(kind, converter, tokenizer)
    if (ranks := _merge_ranks(tokenizer)) is not None:
        add_scores = converter.gguf_writer.add_token_scores
        converter.gguf_writer.add_token_scores = lambda scores: add_scores(ranks[: len(scores)])
    return converter


def _adapted(file: Path) -> tuple[dict[str, list[int]], str]:
    """Rewrites a config.json as the converter reads it, and returns the sizes of the blocks and the class of the model.

    The config of a model with blocks of different sizes becomes that of its family, which the converter knows. The
    length that `llama3` scales rotary embeddings from is read at the top level only.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    sizes, architecture = config.pop("block_sizes", None) or {}, config["architectures"][0]
    if sizes:
        config.pop("auto_map", None)
        architecture = architecture.removeprefix("Shrunk")
        config |= {"architectures": [architecture], "model_type": config["model_type"].removeprefix("shrunk_")}
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    file.write_text(json.dumps(config), encoding="utf-8")
    return sizes, architecture


def _by_block(kind: Any, sizes: Mapping[str, list[int]]) -> Any:
    """Returns a converter for blocks of different sizes.

    Args:
        kind: llama.cpp's converter of Llama.
        sizes: By field of the Hugging Face config, its value in each block.
    """
    import gguf

    class ByBlock(kind):
        model_arch = gguf.MODEL_ARCH.DECI
        hparams: dict[str, Any]

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()

            def values(field: str) -> list[int]:
                return sizes.get(field) or [self.hparams[field]] * self.block_count

            # written as single numbers by now
            prefix = f"{self.gguf_writer.arch}."
            for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
                del self.gguf_writer.kv_data[0][prefix + key]
            self.gguf_writer.add_feed_forward_length(values("intermediate_size"))
            self.gguf_writer.add_head_count(values("num_attention_heads"))
            self.gguf_writer.add_head_count_kv(values("num_key_value_heads"))

        def modify_tensors(self, data_torch: Tensor, name: str, bid: int | None) -> Iterator[tuple[str, Tensor]]:
            shared = self.hparams
            if bid is not None:
                self.hparams = {**shared, **{field: values[bid] for field, values in sizes.items()}}
            yield from super().modify_tensors(data_torch, name, bid)
            self.hparams = shared

    return ByBlock


def _pre_tokenizer(kind: Any, converter: Any, tokenizer: Tokenizer) -> str:
    """Returns llama.cpp's name of the pre-tokenizer, by the converter's hash or else by its rules.

    Raises:
        InputError: if llama.cpp has no name for it.
    """
    try:
        return kind.get_vocab_base_pre(converter, tokenizer)
    except NotImplementedError as error:
        rules = _rules(tokenizer)
        for name, known in PRE_TOKENIZERS.items():
            if rules == known:
                return name
        raise InputError(
            f"the pre-tokenizer must be that of a published model, or {' or '.join(PRE_TOKENIZERS)}, got {rules}"
        ) from error


def _merge_ranks(tokenizer: Any) -> list[float] | None:
    """Returns the score of each token of a SentencePiece BPE in tokenizer.json; None for any other vocabulary.

    llama.cpp merges the pair whose token has the highest score. The converter reads the scores from tokenizer.model,
    which newer folders lack, and gives all tokens the same score without it. Merges are sorted by them, so that the
    score of a token is minus the position of its merge.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if described["type"] != "BPE" or not described["byte_fallback"]:
        return None
    last = -float(len(described["merges"]))
    scores = [last] * (max(tokenizer.get_vocab().values()) + 1)
    for rank, pair in reversed(list(enumerate(described["merges"]))):
        scores[described["vocab"]["".join(pair)]] = -float(rank)
    return scores


def _rules(tokenizer: Any) -> list[dict[str, Any]]:
    """Returns what happens to a text before the BPE of ``tokenizer``: its normaliser and its pre-tokenizers."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = [rule for key in ("normalizer", "pre_tokenizer") if (rule := described[key]) is not None]
    rules = [part for rule in rules for part in rule.get("pretokenizers", rule.get("normalizers", [rule]))]
    return [{key: value for key, value in rule.items() if key != "trim_offsets"} for rule in rules]


def _conversion() -> ModuleType:
    """Returns llama.cpp's package `conversion`, which finds its own modules under that name only."""
    if (loaded := sys.modules.get("conversion")) is not None:
        return loaded
    auto_round = importlib.util.find_spec("auto_round")
    assert auto_round is not None
    assert auto_round.origin is not None
    folder = Path(auto_round.origin).parent / "export" / "export_to_gguf"
    found = PathFinder.find_spec("conversion", [str(folder)])
    if found is None or found.loader is None:
        raise InputError(
            f"`format` GGUF needs a version of auto-round that has llama.cpp's converter, {folder} has none. Install "
            f"it by: {INSTALL}."
        )
    module = importlib.util.module_from_spec(found)
    sys.modules["conversion"] = module
    found.loader.exec_module(module)
    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    return module
