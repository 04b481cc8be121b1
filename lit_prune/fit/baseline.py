"""The baseline of a training without cuts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import measure
from lit_prune.masks.zeros import zero_shares
from lit_prune.models import structure
from lit_prune.models.on_disk import placed
from lit_prune.recover.merge import without_adapter
from lit_prune.report.records import Baseline, with_perplexity


def measure_baseline(
    model: PreTrainedModel,
    validation: tuple[Iterable[Batch], str] | None,
    device: torch.device,
    *,
    moves: bool = True,
) -> Baseline:
    """Returns the structure record of ``model``, the sparsity of its masked blocks, and its perplexity.

    Args:
        model: The causal LM, with or without an adapter.
        validation: Validation batches and their description; None measures no perplexity.
        device: Device that the perplexity is measured on.
        moves: Whether to move the whole model to ``device``; otherwise its blocks are moved one at a time.
    """
    achieved, sparsity = zero_shares(without_adapter(model)) if structure.masked(model) else ([], 0.0)
    baseline = Baseline(0, structure.record(model), {}, {}, None, achieved, sparsity)
    if validation is None:
        return baseline
    model = placed(model, device) if moves else model
    measured = measure(model, *validation, label="Perplexity, before", device=device, streamed=not moves)
    return replace(with_perplexity(baseline, "before", measured), protocol=measured.protocol)
