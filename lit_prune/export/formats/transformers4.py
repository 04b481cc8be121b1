"""Fields of config.json and tokenizer_config.json under the names that transformers 4 reads.

transformers 5 has moved the settings of rotary embeddings into `rope_parameters` and renamed some others. It reads the
earlier names as well, while transformers 4 silently takes the defaults of the family where it does not find them. So
both are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Fields = dict[str, Any]
# names of rotary settings in families that had their own
ROTARY_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
BY_LAYER_TYPE = ("gemma3", "gemma3_text", "gemma3n_text", "olmo3")
RENAMED = {"num_local_experts": "num_experts"}  # of Qwen3-MoE


def add_earlier_names(folder: Path) -> None:
    """Adds the earlier names to config.json and, if there is one, tokenizer_config.json in ``folder``."""
    _rewrite(folder / "config.json", with_earlier_names)
    if (folder / "tokenizer_config.json").is_file():
        _rewrite(folder / "tokenizer_config.json", _known_tokenizer)


def with_earlier_names(config: Fields) -> Fields:
    """Returns a config, in JSON types, with the fields that transformers 4 reads; fields that exist are not changed.

    >>> with_earlier_names({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})["rope_theta"]
    500000.0
    """
    added = _rotary(config) | {RENAMED[name]: config[name] for name in RENAMED if name in config}
    if isinstance(config.get("text_config"), dict):  # of a multimodal model
        config = {**config, "text_config": with_earlier_names(config["text_config"])}
    return {**added, **config}


def _rotary(config: Fields) -> Fields:
    """Returns the settings of the rotary embeddings as separate fields.

    Where they differ by layer type, the families that transformers 4 knows have a second theta, for sliding windows.
    """
    rope, family = config.get("rope_parameters") or {}, config.get("model_type", "")
    if "full_attention" not in rope:
        names = ROTARY_NAMES.get(family, {})
        return {names.get(name, name): value for name, value in _separate(rope).items()}
    if family not in BY_LAYER_TYPE:
        return {}
    return {**_separate(rope["full_attention"]), "rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}


def _separate(rope: Fields) -> Fields:
    """Returns theta, the rotated share, and the rest as `rope_scaling` unless the embeddings are the plain ones."""
    own = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if rope.get(name) is not None}
    if rope.get("rope_type", "default") == "default":
        return own
    return {**own, "rope_scaling": {name: value for name, value in rope.items() if name not in own}}


def _known_tokenizer(config: Fields) -> Fields:
    """Returns the config of a tokenizer with its class and its special tokens as transformers 4 calls them.

    transformers 5 takes both names of either, and TokenizersBackend is its name of PreTrainedTokenizerFast.
    """
    known = dict(config)
    if known.get("tokenizer_class") == "TokenizersBackend":
        known["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(known.get("extra_special_tokens"), list):
        known["additional_special_tokens"] = known.pop("extra_special_tokens")
    return known


def _rewrite(file: Path, change: Callable[[Fields], Fields]) -> None:
    config = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
