"""The record of what was done to a model: a small JSON-able dict that travels in the Hugging Face config.

It is in config.json of an exported folder and in every checkpoint; a model is rebuilt from it before weights load.
Fields: `recipe` (what was asked for), `rates` (share removed, by block), `masked` (weights were set to zero), `slice`
(`untied_head`: the head was tied to the embedding before), `recovery` (what was trained after that), `distillation`
(how the dense model taught it). The widths of a sliced model are in its config's own `slice_sizes`.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

KEY = "lit_prune"


def record(model: PreTrainedModel) -> dict[str, Any]:
    """Returns what was done to ``model`` so far; empty for a model that was never pruned."""
    return dict(getattr(model.config, KEY, None) or {})


def write(model: PreTrainedModel, **fields: Any) -> None:
    """Adds ``fields`` to the record in the model's config."""
    setattr(model.config, KEY, {**record(model), **fields})


def masked(model: PreTrainedModel) -> bool:
    """Returns whether weights of ``model`` were set to zero, and are to stay so."""
    return bool(record(model).get("masked"))
