"""Reopens an exported folder and compares it with the model in memory, before the folder gets its name.

Compared are the weights, bit for bit with those that were written; the zeros of what was pruned; the logits on one
window, with those of the model as it was trained and validated, adapter included; and the perplexity. Weights that are
quantised again after a merge make another model than the one that was trained: there the written model is the
reference.

A training that diverged leaves nothing to compare, since NaN does not even equal itself: ``check_trained`` comes before
anything is merged or written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import evaluating, measure
from lit_prune.export.formats.base import ExportFormat
from lit_prune.export.plan import ExportPlan
from lit_prune.masks.zeros import pruned_blocks, zeros
from lit_prune.models.families import Block
from lit_prune.models.linears import QuantisedLinear
from lit_prune.models.quantised import check_zeros
from lit_prune.recover.merge import without_adapter

Validation = tuple[Iterable[Batch], str]
WINDOW_TOKENS = 128
TOLERANCE = 1e-3  # share of the perplexity, and of the largest logit; the wider ones are for half precision
PERPLEXITY_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2}
LOGIT_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Verification:
    """The result of comparing a reopened folder with the model in memory.

    Attributes:
        format: Class of the export format.
        merged: Whether an adapter is merged into the weights.
        adapter_beside: Whether an adapter lies beside the weights.
        zeros_expected: Zeros that the last cut left in the linears it chose; None for a model without masks.
        zeros_found: Zeros of the folder in the same linears; kept weights may have become zero by themselves.
        max_logit_difference: Largest absolute difference of the logits on one window.
        perplexity: The folder's; None where none was measured in memory to compare it with.
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
    """Checks that training left a model that can be exported.

    Args:
        model: The trained model in memory, with or without an adapter.
        perplexity: That of the trained model, where it was measured.

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
        plan: What was exported.
        format: The format that it was written in, which opens it.
        validation: Batches to measure the perplexity on, and what they are called.
        achieved: Share of every block's pruned linears that the last cut set to zero; None counts the zeros in memory.
        perplexity: That of the model in memory; None compares none.
        device: Where the blocks of a model on disk compute.

    Raises:
        RuntimeError: if the folder holds another model.
        InputError: if the logits of the model in memory are not finite.
    """
    opened = format.open(folder, plan.plain.device, on_disk=plan.outline.on_disk)
    weights = without_adapter(opened)
    _compare_weights(plan.plain, weights)
    expected, found = _compare_zeros(plan, weights, achieved) if plan.outline.masked else (None, None)
    return Verification(
        format=type(format).__name__,
        merged=plan.merged,
        adapter_beside=plan.adapter_beside,
        zeros_expected=expected,
        zeros_found=found,
        max_logit_difference=_compare_logits(plan.reference, opened, validation),
        perplexity=_compare_perplexity(opened, perplexity, validation, device),
    )


def _compare_weights(written: PreTrainedModel, opened: PreTrainedModel) -> None:
    """Raises RuntimeError for a tensor that is not read as it was written."""
    state = opened.state_dict()
    for name, tensor in written.state_dict().items():
        if not torch.equal(state[name], tensor):
            raise RuntimeError(f"the exported model's {name} is not what was written; not kept.")


def _compare_zeros(plan: ExportPlan, opened: PreTrainedModel, achieved: Sequence[float] | None) -> tuple[int, int]:
    """The zeros that the last cut left in the linears it chose, and the zeros of the folder there.

    A kept weight may have become zero by itself, so that there may be more, never fewer.
    """
    before, after = pruned_blocks(plan.base), pruned_blocks(opened)
    expected = sum(block.pruned for block in before)
    for block, reopened in zip(before, after, strict=True):
        _compare_masks(block, reopened)
    if achieved:
        expected = sum(round(share * block.size) for share, block in zip(achieved, before, strict=True))
    found = _zeros(after)
    if found < expected:
        raise RuntimeError(f"the exported model has {found} zeros in the pruned linears of {expected}; not kept.")
    return expected, found


def _compare_masks(before: Block, after: Block) -> None:
    """Raises RuntimeError where a weight is not zero although the mask of a quantised linear says it was pruned."""
    for name, linear in before.linears.items():
        if isinstance(linear, QuantisedLinear):
            check_zeros(after.linears[name].weight_OI, linear.module, f"exported model's {before.path}.{name}")


def _zeros(blocks: Iterable[Block]) -> int:
    return zeros(linear.weight_OI for block in blocks for linear in block.linears.values())[0]


@torch.no_grad()
def _compare_logits(model: PreTrainedModel, opened: PreTrainedModel, validation: Validation | None) -> float:
    """The largest difference of the logits on one window."""
    ids_BT = _window(model, validation)
    with evaluating(model):
        expected = model(ids_BT, use_cache=False).logits.float()
    if not expected.isfinite().all():
        raise InputError(
            "the model's logits are not finite, which no folder can be compared with; not kept. Where it was trained, "
            "`model.lr` must be lower."
        )
    difference = float((opened(ids_BT, use_cache=False).logits.float() - expected).abs().max())
    allowed = LOGIT_TOLERANCE.get(model.dtype, TOLERANCE) * float(expected.abs().max())
    if not difference <= allowed:  # NaN is never within the tolerance
        raise RuntimeError(
            f"the exported model's logits differ by {difference:.3g} from those in memory, where {allowed:.3g} is "
            "rounding; not kept."
        )
    return difference


def _window(model: PreTrainedModel, validation: Validation | None) -> Tensor:
    """The first tokens of the validation text, or any; shape (1, tokens)."""
    batch = None if validation is None else next(iter(validation[0]), None)
    if batch is not None:
        return batch["input_ids"][:1, :WINDOW_TOKENS].to(model.device)
    limit = getattr(model.config, "max_position_embeddings", None) or WINDOW_TOKENS
    return torch.arange(min(WINDOW_TOKENS, limit), device=model.device)[None] % model.config.vocab_size


def _compare_perplexity(
    opened: PreTrainedModel, expected: float | None, validation: Validation | None, device: torch.device | None
) -> float | None:
    """The perplexity of the folder, where there is one in memory to compare it with."""
    if validation is None or expected is None:
        return None
    found = measure(opened, *validation, label="Perplexity, exported folder", device=device).perplexity
    allowed = PERPLEXITY_TOLERANCE.get(opened.dtype, TOLERANCE)
    # both may be infinite, which divide to NaN; NaN itself is never right
    if found != expected and not abs(found / expected - 1) <= allowed:
        raise RuntimeError(f"the exported model's perplexity is {found:.4f}, in memory it is {expected:.4f}; not kept.")
    return found
