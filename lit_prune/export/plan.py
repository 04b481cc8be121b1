"""The plan of an export: its form and the models that it is made of, worked out once at the end of a run.

A masked adapter is always merged: the merge keeps the zeros, and peft, which knows no masks, would load it as a plain
one. The adapter of a model without masks is merged too. Plain LoRA over masks is not merged, since B A is dense and
would fill every zero. Over quantised weights the form is the one that QLoRA was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import size_bytes
from lit_prune.export.data_type import converted
from lit_prune.models import structure
from lit_prune.models.custom_code import runs_custom_code
from lit_prune.models.families import CustomClass, custom_class, dense_family
from lit_prune.models.on_disk import on_disk
from lit_prune.models.quantised import (
    check_zeros,
    dequantised,
    is_quantised,
    quantisation,
    quantised_linears,
    sharing_weight,
)
from lit_prune.recipe import Recipe
from lit_prune.recover import Recovery, Snapshot, adapter_config, quantise
from lit_prune.recover.adapter import trains_tied_head
from lit_prune.recover.base import ExportForm
from lit_prune.recover.merge import merged, record_quantisation, without_adapter


def form_of(snapshot: Snapshot) -> ExportForm:
    """Returns the form in which a model is exported.

    - `full precision`, `quantised`: the weights as they are, of a model without an adapter;
    - `merged`: the adapter merged into weights in full precision;
    - `requantised`: merged, and quantised again;
    - `adapter`: the weights as they are and the adapter beside them.

    Args:
        snapshot: Snapshot of the model, for example from a checkpoint.
    """
    quantised, requested = snapshot.quantisation is not None, snapshot.record.get("form")
    if snapshot.adapter is None:
        return "quantised" if quantised else "full precision"
    if quantised and requested:
        return requested
    fills_zeros = snapshot.record.get("masked") and not snapshot.masked_adapter
    return "adapter" if fills_zeros else "merged"


def check_merge(snapshot: Snapshot) -> None:
    """Checks that the export of a model leaves no adapter beside the weights.

    Args:
        snapshot: Snapshot of the model, for example from a checkpoint.

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
    """The properties of an exported model that a format may not support.

    Attributes:
        form: Form of the export, see :func:`form_of`.
        family: The dense model's `model_type`, as transformers calls it.
        masked: Whether weights were set to zero.
        reshaped: Whether the model has another shape than the dense one, see ``models.structure.Structure``.
        custom_class: Kind of the model if transformers does not have its class: `sliced`, or `shrunk` to blocks of
            different sizes; else None.
        on_disk: Whether the weights are larger than memory and stay on disk.
        quantised: Whether the weights that are written are quantised.
        custom_code: Whether the model is opened by code of its own, which is saved with it.
        biased: Whether linears of the blocks have biases.
        fewer: What a cut that is still to come leaves fewer of, see ``Method.fewer``.
    """

    form: ExportForm
    family: str
    masked: bool = False
    reshaped: bool = False
    custom_class: CustomClass | None = None
    on_disk: bool = False
    quantised: bool = False
    custom_code: bool = False
    biased: bool = False
    fewer: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: PreTrainedModel) -> Outline:
        """Returns the outline of ``model`` as it is."""
        snapshot = Snapshot.of(model)
        form = form_of(snapshot)
        return cls(
            form=form,
            family=dense_family(model.config),
            masked=bool(snapshot.record.get("masked")),
            reshaped=bool(snapshot.structures),
            custom_class=custom_class(model.config),
            on_disk=on_disk(model) is not None,
            quantised=snapshot.quantisation is not None and form != "merged",
            custom_code=runs_custom_code(model),
            biased=_biased(model),
        )

    @classmethod
    def expected(
        cls, model: PreTrainedModel, recipe: Recipe | None, recovery: Recovery | None, *, on_disk: bool = False
    ) -> Outline | None:
        """Returns the outline that ``model`` will have after a cut and a recovery; None where that is not known yet.

        Args:
            model: The model before the cut; it may be on the meta device.
            recipe: What is cut; None if the model is only trained.
            recovery: What is trained after the cut; None where no adapter is attached.
            on_disk: Whether the weights stay on disk.
        """
        if recipe is None and (recovery is None or adapter_config(model) is not None):
            return replace(cls.of(model), on_disk=on_disk)
        method = None if recipe is None else recipe.method
        new_class = None if recipe is None else recipe.method.custom_class(recipe.allocation)
        quantised = recipe is None and quantisation(model) is not None
        masked = (method is not None and method.makes_zeros) or structure.masked(model)
        # an adapter that is trained over a quantised model stays beside it, see ``recover.existing_masks.attach``
        form = "adapter" if quantised else "full precision" if recovery is None else recovery.export_form(masked)
        if form is None:
            return None
        return cls(
            form=form,
            family=dense_family(model.config),
            masked=masked,
            reshaped=(method is not None and method.changes_shapes) or bool(structure.structures(model)),
            custom_class=new_class or custom_class(model.config),
            on_disk=on_disk,
            quantised=quantised or (recovery is not None and recovery.quantises and form != "merged"),
            custom_code=runs_custom_code(model),
            biased=_biased(model),
            fewer=frozenset() if method is None else method.fewer,
        )


def _biased(model: PreTrainedModel) -> bool:
    return any("_proj." in name and name.endswith(".bias") for name, _ in model.named_parameters())


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """A model and the weights that will be written.

    Attributes:
        model: The model in memory, with or without an adapter; an export does not change it.
        base: The model without the adapter, sharing its weights; parameters and zeros are counted in it.
        plain: The model whose weights are written, in the data type in which they are written: ``base``, or ``base``
            with the adapter merged and, for the form `requantised`, quantised again.
        outline: The properties of the export.
    """

    model: PreTrainedModel
    base: PreTrainedModel
    plain: PreTrainedModel
    outline: Outline

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype | None = None) -> ExportPlan:
        """Returns the plan for ``model``. Merging copies the weights that have an adapter.

        Args:
            model: The model in memory.
            dtype: Data type to write; None is the model's. Another one copies all weights that are not quantised.

        Raises:
            RuntimeError: if a pruned weight is not zero in the weights to write.
            InputError: for a weight that is too large for ``dtype``.
        """
        outline = Outline.of(model)
        base = without_adapter(model)
        plain = merged(model) if outline.form in ("merged", "requantised") else base
        if outline.form == "requantised":
            _requantise(plain, model)
        if dtype not in (None, plain.dtype):
            plain = converted(plain, dtype)
        _check_zeros(model, plain)
        return cls(model, base, plain, outline)

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the weights that are written."""
        return self.outline.form in ("merged", "requantised")

    @property
    def unties_head(self) -> bool:
        """Whether the head was tied to the embedding and, trained by an adapter, is written as a matrix of its own."""
        return self.merged and trains_tied_head(self.model)

    @property
    def adapter_beside(self) -> bool:
        """Whether an adapter is saved beside the weights."""
        return self.outline.form == "adapter"

    @property
    def reference(self) -> PreTrainedModel:
        """The model whose logits and perplexity the exported one must have.

        It is the trained model, unless the merged weights are quantised again, which rounds them to another model.
        """
        return self.plain if self.outline.form == "requantised" else self.model

    @property
    def rounded(self) -> bool:
        """Whether the weights are written in another data type than that of the model in memory."""
        return self.plain.dtype != self.model.dtype

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Data type to open the written weights in, so that they compute as the model in memory; None is their own."""
        return self.model.dtype if self.rounded else None

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that are written, those of an adapter beside the weights included."""
        adapter = size_bytes(self.model) - size_bytes(self.base) if self.adapter_beside else 0
        return size_bytes(self.plain) + adapter


def _requantise(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    """Quantises the merged weights of ``plain`` in place, as those of ``model``, in linears that transformers saves."""
    quantise(plain, **quantisation(model))  # type: ignore[arg-type]
    for name, module in list(quantised_linears(plain)):
        plain.set_submodule(name, sharing_weight(module))
    record_quantisation(plain)


def _check_zeros(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Raises RuntimeError if a weight that a quantised linear of ``model`` masks is not zero in ``plain``."""
    for name, module in quantised_linears(model):
        exported: Any = plain.get_submodule(name.replace(".base_layer", ""))  # peft moves a linear under that name
        weight = dequantised(exported) if is_quantised(exported) else exported.weight
        check_zeros(weight.T if isinstance(exported, Conv1D) else weight, module, f"exported {name}")
