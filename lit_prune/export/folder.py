"""An ordinary Hugging Face folder: the weights, an adapter that cannot be merged beside them, tokenizer, model card.

A masked adapter is merged always: the zeros stay, and plain peft would take it for one that is not masked. The adapter
of a model without masks is merged too. Plain LoRA over masks is not, since B A is dense and would fill every zero: its
files lie at the root of the folder in peft's layout, so that a plain ``from_pretrained`` loads pruned weights and
adapter together (where peft is installed). A model that QLoRA quantised is written in the form that it was trained for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import InputError
from lit_prune.models.on_disk import save
from lit_prune.models.quantised import (
    check_zeros,
    dequantised,
    is_quantised,
    quantisation,
    quantised_linears,
    sharing_weight,
)
from lit_prune.recover import Snapshot, adapter_config, quantise
from lit_prune.recover.merge import merged, record_quantisation, without_adapter


def export(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
    *,
    written: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Writes ``model`` into ``folder``, which plain ``transformers`` opens; returns the model whose weights are there.

    Args:
        model: A causal LM, with or without a LoRA adapter; it is left as it is.
        folder: Made where it is missing.
        tokenizer: Saved beside the model.
        card: Text of the model card, README.md.
        written: What :func:`exported` returns of ``model``, where that was asked already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if adapter_config(model) is not None and not merges(model):
        model.save_pretrained(folder)  # with an adapter on it, transformers saves the adapter alone
        _name_base(folder / "adapter_config.json")
    plain = written or exported(model)
    save(plain, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return plain


def exported(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model whose weights are exported for ``model``: without the adapter, merged or not, quantised or not.

    Raises:
        RuntimeError: if a weight that was pruned is not zero in it.
    """
    plain = merged(model) if merges(model) else without_adapter(model)
    if form(model) == "requantised":
        quantise(plain, **quantisation(model))  # type: ignore[arg-type]
        for name, module in list(quantised_linears(plain)):
            plain.set_submodule(name, sharing_weight(module))
        record_quantisation(plain)
    _check_zeros(model, plain)
    return plain


def form(model: PreTrainedModel) -> str | None:
    """Returns in which form a quantised model is exported, as QLoRA calls it; None for one in full precision."""
    return _form(Snapshot.of(model))


def _form(snapshot: Snapshot) -> str | None:
    return snapshot.record.get("form") if snapshot.quantisation and snapshot.adapter else None


def merges(model: PreTrainedModel) -> bool:
    """Returns whether the adapter on ``model`` is merged when that is exported: wherever that fills no zeros.

    Over quantised weights the form of the export decides.
    """
    return _mergeable(Snapshot.of(model))


def _mergeable(snapshot: Snapshot) -> bool:
    fills_zeros = snapshot.record.get("masked") and not snapshot.masked_adapter
    return snapshot.adapter is not None and not fills_zeros and _form(snapshot) != "adapter"


def check_merge(snapshot: Snapshot) -> None:
    """Asks whether a model has no adapter, or one that can be merged.

    Args:
        snapshot: The model's, such as a checkpoint has.

    Raises:
        InputError: if the adapter would fill zeros, or was trained to stay beside quantised weights.
    """
    if snapshot.adapter is None or _mergeable(snapshot):
        return
    if _form(snapshot) == "adapter":
        raise InputError(
            "`merge` must be left out for an adapter that was trained to stay beside quantised weights: train with "
            "QLoRA, `--pruning.recovery.form merged` or `requantised`, on weights in full precision."
        )
    raise InputError(
        "`merge` must be left out for LoRA over masks, whose B A is dense and would fill every zero: export the "
        "adapter beside the weights, or train with `--pruning.recovery MaskedLoRA`."
    )


def _check_zeros(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Asks whether ``plain`` is zero wherever the masks of the quantised linears of ``model`` say so."""
    for name, module in quantised_linears(model):
        other: Any = plain.get_submodule(name.replace(".base_layer", ""))
        weight = dequantised(other) if is_quantised(other) else other.weight
        check_zeros(weight.T if isinstance(other, Conv1D) else weight, module, f"exported {name}")


def _name_base(adapter: Path) -> None:
    """Makes the folder that the adapter lies in its base."""
    config = json.loads(adapter.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "."
    adapter.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
