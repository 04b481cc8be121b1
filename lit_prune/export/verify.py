"""Reopens an exported folder and compares it with the model in memory, before it gets its name.

A training that diverged leaves nothing to compare, NaN is not even itself: that is asked before anything is written.
Its weights are those that were written, bit for bit; nothing that was pruned has been filled; its logits on one window
are those of the model as it was trained and validated, adapter and all; so is its perplexity. Weights that were
quantised again after a merge are another model's than the one that was trained: there it is the model that was written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import evaluating, measure
from lit_prune.masks.zeros import pruned_blocks, zeros
from lit_prune.models import structure
from lit_prune.models.families import Block
from lit_prune.models.linears import QuantisedLinear
from lit_prune.models.on_disk import keep_on_disk, on_disk
from lit_prune.models.quantised import check_zeros, compute_exactly
from lit_prune.recover.merge import without_adapter

Validation = tuple[Iterable[Batch], str]
WINDOW_TOKENS = 128
TOLERANCE = 1e-3  # share of the perplexity, and of the largest logit; the wider ones are for half precision
PERPLEXITY_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2}
LOGIT_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 5e-2}


def check_trained(model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Asks whether the training left a model.

    Args:
        model: The model in memory, perhaps with an adapter.
        report: The report so far; one that knows no seconds of training is not asked about.

    Raises:
        InputError: for weights that are not finite, and for a perplexity that is no number.
    """
    if "train" not in report["seconds"]:
        return
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise InputError(
                f"`model.lr` must be lower: the training diverged, {name} is not finite; no model is written."
            )
    measured = [value for value in report["perplexity"].values() if value is not None]
    if measured and math.isnan(measured[-1]):
        raise InputError("`model.lr` must be lower: the training diverged, the perplexity is NaN; no model is written.")


def verify(
    folder: Path,
    model: PreTrainedModel,
    written: PreTrainedModel,
    report: dict[str, Any],
    validation: Validation | None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Opens ``folder`` with transformers and compares; returns what report.json says of it.

    Args:
        folder: What was exported.
        model: The model in memory, perhaps with an adapter.
        written: The model whose weights were exported, without an adapter.
        report: The report so far.
        validation: What the perplexity is measured on.
        device: Where the blocks of a model on disk compute.

    Raises:
        RuntimeError: if the folder holds another model.
        InputError: if the model in memory gives no numbers.
    """
    opened = AutoModelForCausalLM.from_pretrained(folder).to(written.device)  # type: ignore[arg-type]
    compute_exactly(opened)
    requantised = (report.get("quantised") or {}).get("form") == "requantised"
    if on_disk(written) is not None:
        keep_on_disk(opened)
    _compare_weights(written, without_adapter(opened))
    unmerged = None if not report["adapter"] else "unmerged, at the root of model/"
    return {
        "verified": True,
        "merged": report["merged"],
        "adapter": "merged" if report["merged"] else unmerged,
        **_compare_zeros(model, without_adapter(opened), report),
        "max_logit_difference": _compare_logits(written if requantised else model, opened, validation),
        **_compare_perplexity(opened, report, validation, device),
    }


def _compare_weights(written: PreTrainedModel, opened: PreTrainedModel) -> None:
    """Raises RuntimeError for a tensor that is not read as it was written."""
    found = opened.state_dict()
    for name, tensor in written.state_dict().items():
        if not torch.equal(found[name], tensor):
            raise RuntimeError(f"the exported model's {name} is not what was written; not kept.")


def _compare_zeros(model: PreTrainedModel, opened: PreTrainedModel, report: dict[str, Any]) -> dict[str, int | None]:
    """The zeros that the last cut left in the linears it chose, and how many zeros the folder has there.

    A kept weight may have come to zero by itself, so that there may be more, never less.
    """
    if not structure.masked(model):
        return {"zeros_expected": None, "zeros_found": None}
    before, after = pruned_blocks(without_adapter(model)), pruned_blocks(opened)
    expected = sum(block.pruned for block in before)
    for one, other in zip(before, after, strict=True):
        _compare_masks(one, other)
    if report.get("achieved"):
        shares = zip(report["achieved"], before, strict=True)
        expected = sum(round(share * block.size) for share, block in shares)
    found = _zeros(after)
    if found < expected:
        raise RuntimeError(f"the exported model has {found} zeros in the pruned linears of {expected}; not kept.")
    return {"zeros_expected": expected, "zeros_found": found}


def _compare_masks(before: Block, after: Block) -> None:
    """Raises RuntimeError where a weight is not zero that the mask of a quantised linear says was pruned."""
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
    if not difference <= allowed:
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
    opened: PreTrainedModel, report: dict[str, Any], validation: Validation | None, device: torch.device | None
) -> dict[str, float]:
    """The perplexity of the folder, where there is one in memory to compare it with."""
    values = [value for value in report["perplexity"].values() if value is not None]
    if validation is None or not values:
        return {}
    found = measure(opened, *validation, label="Perplexity, exported folder", device=device).perplexity
    expected, allowed = values[-1], PERPLEXITY_TOLERANCE.get(opened.dtype, TOLERANCE)
    if found != expected and not abs(found / expected - 1) <= allowed:  # both may be infinite; NaN is never right
        raise RuntimeError(f"the exported model's perplexity is {found:.4f}, in memory it is {expected:.4f}; not kept.")
    return {"perplexity": found}
