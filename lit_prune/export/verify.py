"""Reopens an exported folder and compares it with the model in memory, before the folder gets its name.

The comparison covers the weights, bit for bit unless the format is lossy; the zeros of the pruned linears; the logits
on one window, which must be those of the model that was trained and validated, adapter included; and the perplexity.
Weights that were written in another data type are opened in that of the model in memory, so that the perplexity of what
was written can be compared with the others of the run.
Quantising again after a merge makes another model than the one that was trained, so there the written model is the
reference.

After a training that diverged there is nothing to compare, since NaN does not equal itself: ``check_trained`` refuses
such a model before anything is merged or written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import evaluating, measure
from lit_prune.export.formats.base import ExportFormat, Tolerance
from lit_prune.export.plan import ExportPlan
from lit_prune.masks.zeros import pruned_blocks, zeros
from lit_prune.models.families import Block
from lit_prune.models.linears import QuantisedLinear
from lit_prune.models.quantised import check_zeros
from lit_prune.recover.merge import without_adapter

Validation = tuple[Iterable[Batch], str]
WINDOW_TOKENS = 128
# shares of the perplexity and of the largest logit that rounding explains; a lossy format may allow more
TOLERANCE = 1e-3
PERPLEXITY_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2}
ROUNDED = 0.25  # of weights that were rounded to another type: another model, whose weights are compared bit for bit
LOGIT_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Verification:
    """The result of comparing a reopened folder with the model in memory.

    Attributes:
        format: Class name of the export format.
        merged: Whether an adapter is merged into the weights.
        adapter_beside: Whether an adapter is saved beside the weights.
        zeros_expected: Number of zeros that the last cut left in the linears it pruned; None for a model without masks.
        zeros_found: Number of zeros of the reopened model in the same linears. It can be greater, since training may
            bring other weights to zero.
        max_logit_difference: Largest absolute difference of the logits on one window.
        perplexity: Perplexity of the reopened model, computed in the data type of the model in memory; None if none was
            measured there to compare it with.
    """

    format: str
    merged: bool
    adapter_beside: bool
    zeros_expected: int | None
    zeros_found: int | None
    max_logit_difference: float
    perplexity: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the section `export` of report.json."""
        beside = "unmerged, at the root of model/" if self.adapter_beside else None
        measured = {} if self.perplexity is None else {"perplexity": self.perplexity}
        return {
            "verified": True,
            "format": self.format,
            "merged": self.merged,
            "adapter": "merged" if self.merged else beside,
            "zeros_expected": self.zeros_expected,
            "zeros_found": self.zeros_found,
            "max_logit_difference": self.max_logit_difference,
            **measured,
        }


def check_trained(model: PreTrainedModel, perplexity: float | None = None) -> None:
    """Checks that training did not diverge.

    Args:
        model: The trained model in memory, with or without an adapter.
        perplexity: Its perplexity, if it was measured.

    Raises:
        InputError: for weights that are not finite, and for a perplexity of NaN.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise InputError(
                f"`model.lr` must be lower: the training diverged, {name} is not finite; no model is written."
            )
    if perplexity is not None and math.isnan(perplexity):
        raise InputError("`model.lr` must be lower: the training diverged, the perplexity is NaN; no model is written.")


def verify(
    folder: Path,
    plan: ExportPlan,
    format: ExportFormat,
    validation: Validation | None = None,
    *,
    achieved: Sequence[float] | None = None,
    perplexity: float | None = None,
    device: torch.device | None = None,
) -> Verification:
    """Opens ``folder`` and compares it with the model in memory.

    Args:
        folder: The exported folder.
        plan: The plan of the export.
        format: The format that it was written in.
        validation: Batches to measure the perplexity on, and the name of their text.
        achieved: Share of zeros that the last cut left in the pruned linears of each block; None counts the zeros in
            memory.
        perplexity: Perplexity of the model in memory; None skips the comparison.
        device: Device that computes the blocks of a model on disk.

    Raises:
        RuntimeError: if the reopened model differs.
        InputError: if the logits of the model in memory are not finite.
    """
    opened = format.open(
        folder,
        plan.plain.device,
        dtype=plan.compute_dtype,
        on_disk=plan.outline.on_disk,
        trust_remote_code=plan.outline.custom_code,
    )
    weights = without_adapter(opened)
    _compare_weights(plan.plain, weights, format.tolerance)
    expected, actual = _compare_zeros(plan, weights, achieved) if plan.outline.masked else (None, None)
    tolerance = _with_rounding(format.tolerance, plan)
    return Verification(
        format=type(format).__name__,
        merged=plan.merged,
        adapter_beside=plan.adapter_beside,
        zeros_expected=expected,
        zeros_found=actual,
        max_logit_difference=_compare_logits(plan.reference, opened, validation, tolerance),
        perplexity=_compare_perplexity(opened, perplexity, validation, device, tolerance),
    )


def _with_rounding(tolerance: Tolerance, plan: ExportPlan) -> Tolerance:
    """Returns the tolerance of a format, widened to what the rounding of weights and results explains."""
    logits, perplexity = (
        ROUNDED if plan.rounded else by_dtype.get(plan.model.dtype, TOLERANCE)
        for by_dtype in (LOGIT_TOLERANCE, PERPLEXITY_TOLERANCE)
    )
    return replace(tolerance, logits=max(tolerance.logits, logits), perplexity=max(tolerance.perplexity, perplexity))


def _compare_weights(written: PreTrainedModel, opened: PreTrainedModel, tolerance: Tolerance) -> None:
    """Raises RuntimeError for a tensor that differs from the one that was written."""
    state = opened.state_dict()
    for name, tensor in written.state_dict().items():
        expected = tensor.to(opened.dtype) if tensor.dtype == written.dtype else tensor
        if not _equal(state[name], expected, tolerance.weights):
            raise RuntimeError(f"the exported model's {name} is not what was written; not kept.")


def _equal(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Returns whether two tensors are equal, within a share of the largest absolute value of ``expected``."""
    if actual.dtype != expected.dtype:
        return False
    if not tolerance or not expected.is_floating_point() or actual.shape != expected.shape:
        return torch.equal(actual, expected)
    allowed = tolerance * float(expected.float().abs().amax()) if expected.numel() else 0.0
    return bool(((actual.float() - expected.float()).abs() <= allowed).all())  # NaN is never within the tolerance


def _compare_zeros(plan: ExportPlan, opened: PreTrainedModel, achieved: Sequence[float] | None) -> tuple[int, int]:
    """Returns the zeros that the last cut left in the linears it pruned, and those of the reopened model there.

    There may be more, since training may bring other weights to zero, but never fewer.
    """
    before, after = pruned_blocks(plan.base), pruned_blocks(opened)
    expected = sum(block.pruned for block in before)
    for block, reopened in zip(before, after, strict=True):
        _compare_masks(block, reopened)
    if achieved:
        expected = sum(round(share * block.size) for share, block in zip(achieved, before, strict=True))
    actual = _zeros(after)
    if actual < expected:
        raise RuntimeError(
            f"the exported model has {actual} zeros in the pruned linears, the one in memory {expected}; not kept."
        )
    return expected, actual


def _compare_masks(before: Block, after: Block) -> None:
    """Raises RuntimeError if a weight that the mask of a quantised linear marks as pruned is not zero."""
    for name, linear in before.linears.items():
        if isinstance(linear, QuantisedLinear):
            check_zeros(after.linears[name].weight_OI, linear.module, f"exported model's {before.path}.{name}")


def _zeros(blocks: Iterable[Block]) -> int:
    return zeros(linear.weight_OI for block in blocks for linear in block.linears.values())[0]


@torch.no_grad()
def _compare_logits(
    model: PreTrainedModel, opened: PreTrainedModel, validation: Validation | None, tolerance: Tolerance
) -> float:
    """Returns the largest absolute difference of the logits on one window; raises RuntimeError if it is too large."""
    ids_BT = _window(model, validation)
    with evaluating(model):
        expected = model(ids_BT, use_cache=False).logits.float()
    if not expected.isfinite().all():
        raise InputError(
            "the model's logits are not finite, so that its export cannot be verified; not kept. If it was trained, "
            "`model.lr` must be lower."
        )
    difference = float((opened(ids_BT, use_cache=False).logits.float() - expected).abs().max())
    allowed = tolerance.logits * float(expected.abs().max())
    if not difference <= allowed:  # NaN is never within the tolerance
        raise RuntimeError(
            f"the exported model's logits differ by {difference:.3g} from those in memory, more than the {allowed:.3g} "
            "that rounding explains; not kept."
        )
    return difference


def _window(model: PreTrainedModel, validation: Validation | None) -> Tensor:
    """Returns the first tokens of the validation text, or arbitrary ones without a text; shape (1, tokens)."""
    batch = None if validation is None else next(iter(validation[0]), None)
    if batch is not None:
        return batch["input_ids"][:1, :WINDOW_TOKENS].to(model.device)
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or WINDOW_TOKENS
    return torch.arange(min(WINDOW_TOKENS, limit), device=model.device)[None] % text.vocab_size


def _compare_perplexity(
    opened: PreTrainedModel,
    expected: float | None,
    validation: Validation | None,
    device: torch.device | None,
    tolerance: Tolerance,
) -> float | None:
    """Returns the perplexity of the reopened model; None if there is none in memory to compare it with."""
    if validation is None or expected is None:
        return None
    actual = measure(opened, *validation, label="Perplexity, exported folder", device=device).perplexity
    # the first comparison accepts two infinite values, whose quotient is NaN; the second refuses every NaN
    if actual != expected and not abs(actual / expected - 1) <= tolerance.perplexity:
        raise RuntimeError(
            f"the exported model's perplexity is {actual:.4f}, in memory it is {expected:.4f}; not kept."
        )
    return actual
