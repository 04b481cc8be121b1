"""The plan of an export: its form and the models that it is made of, worked out once at the end of a run.

A masked adapter is always merged: the zeros stay, and plain peft would read it as one that is not masked. The adapter
of a model without masks is merged too. Plain LoRA over masks is not, since B A is dense and would fill every zero. Over
quantised weights the form that QLoRA trained for decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import size_bytes
from lit_prune.models.on_disk import on_disk
from lit_prune.models.quantised import (
    check_zeros,
    dequantised,
    is_quantised,
    quantisation,
    quantised_linears,
    sharing_weight,
)
from lit_prune.recover import Snapshot, quantise
from lit_prune.recover.merge import merged, record_quantisation, without_adapter

Form = Literal["full precision", "quantised", "merged", "requantised", "adapter"]


def form_of(snapshot: Snapshot) -> Form:
    """Returns the form in which a model is exported.

    - `full precision`, `quantised`: the weights as they are, of a model without an adapter;
    - `merged`: the adapter merged into weights in full precision;
    - `requantised`: merged, and quantised again;
    - `adapter`: the weights as they are and the adapter beside them.

    Args:
        snapshot: The model's, such as a checkpoint has.
    """
    quantised, asked_for = snapshot.quantisation is not None, snapshot.record.get("form")
    if snapshot.adapter is None:
        return "quantised" if quantised else "full precision"
    if quantised and asked_for:
        return asked_for
    fills_zeros = snapshot.record.get("masked") and not snapshot.masked_adapter
    return "adapter" if fills_zeros else "merged"


def check_merge(snapshot: Snapshot) -> None:
    """Checks that a model has no adapter, or one that is merged when it is exported.

    Args:
        snapshot: The model's, such as a checkpoint has.

    Raises:
        InputError: if the adapter would fill zeros, or was trained to stay beside quantised weights.
    """
    if form_of(snapshot) != "adapter":
        return
    if snapshot.quantisation is not None:
        raise InputError(
            "`merge` must be left out for an adapter that was trained to stay beside quantised weights: train with "
            "QLoRA, `--pruning.recovery.form merged` or `requantised`, on weights in full precision."
        )
    raise InputError(
        "`merge` must be left out for LoRA over masks, whose B A is dense and would fill every zero: export the "
        "adapter beside the weights, or train with `--pruning.recovery MaskedLoRA`."
    )


@dataclass(frozen=True)
class Outline:
    """The properties of an export that a format may not be able to hold.

    Attributes:
        form: See :func:`form_of`.
        family: The dense model's `model_type`, as transformers calls it.
        masked: Whether weights were set to zero.
        reshaped: Whether it has another shape than the dense model, see ``models.structure.Structure``.
        on_disk: Whether the weights stay on disk, bigger than memory.
    """

    form: Form
    family: str
    masked: bool = False
    reshaped: bool = False
    on_disk: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> Outline:
        """Returns the outline of ``model`` as it is."""
        snapshot = Snapshot.of(model)
        return cls(
            form=form_of(snapshot),
            family=model.config.model_type.removeprefix("sliced_"),
            masked=bool(snapshot.record.get("masked")),
            reshaped=bool(snapshot.structures),
            on_disk=on_disk(model) is not None,
        )


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """A model and what will be written of it.

    Attributes:
        model: The model in memory, with or without an adapter; an export leaves it as it is.
        base: The same weights without the adapter, shared: what is counted.
        plain: The model whose weights are written: ``base``, or that with the adapter merged, quantised again or not.
        outline: The form, and what else a format may not be able to hold.
    """

    model: PreTrainedModel
    base: PreTrainedModel
    plain: PreTrainedModel
    outline: Outline

    @classmethod
    def of(cls, model: PreTrainedModel) -> ExportPlan:
        """Returns the plan for ``model``. Merging takes a second copy of the weights that have an adapter.

        Raises:
            RuntimeError: if a weight that was pruned is not zero in what would be written.
        """
        outline = Outline.of(model)
        base = without_adapter(model)
        plain = merged(model) if outline.form in ("merged", "requantised") else base
        if outline.form == "requantised":
            _requantise(plain, model)
        _check_zeros(model, plain)
        return cls(model, base, plain, outline)

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the weights that are written."""
        return self.outline.form in ("merged", "requantised")

    @property
    def adapter_beside(self) -> bool:
        """Whether an adapter is written beside the weights."""
        return self.outline.form == "adapter"

    @property
    def reference(self) -> PreTrainedModel:
        """The model that an export must compute the same function as.

        It is the trained one, unless its weights are rounded once more after the merge, which makes another model.
        """
        return self.plain if self.outline.form == "requantised" else self.model

    @property
    def bytes(self) -> int:
        """What the weights that are written take as tensors, with the adapter where it is written beside them."""
        return size_bytes(self.model if self.adapter_beside else self.plain)


def _requantise(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    """Quantises the merged weights of ``plain`` as those of ``model`` are, in linears that transformers can save."""
    quantise(plain, **quantisation(model))  # type: ignore[arg-type]
    for name, module in list(quantised_linears(plain)):
        plain.set_submodule(name, sharing_weight(module))
    record_quantisation(plain)


def _check_zeros(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Raises RuntimeError where ``plain`` is not zero although the mask of a quantised linear of ``model`` is."""
    for name, module in quantised_linears(model):
        other: Any = plain.get_submodule(name.replace(".base_layer", ""))
        weight = dequantised(other) if is_quantised(other) else other.weight
        check_zeros(weight.T if isinstance(other, Conv1D) else weight, module, f"exported {name}")
