"""What a model is before a training that cuts nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import measure
from lit_prune.fit.cut import Done
from lit_prune.masks.zeros import zero_shares
from lit_prune.models import structure
from lit_prune.models.on_disk import placed
from lit_prune.recover.merge import without_adapter


def look(
    model: PreTrainedModel,
    validation: tuple[Iterable[Batch], str] | None,
    device: torch.device,
    *,
    moves: bool = True,
) -> Done:
    """Returns the record of ``model``, the zeros it has, by block, and its perplexity, in plain types.

    Args:
        model: The causal LM, perhaps with an adapter.
        validation: Batches whose perplexity is measured, and what they are.
        device: Where the model is measured.
        moves: Whether it is moved there; else it stays, and its blocks are moved in turn.
    """
    kept: Done = {"step": 0, "record": structure.record(model), "perplexity": {}, "seconds": {}, "protocol": None}
    kept["achieved"], kept["sparsity"] = zero_shares(without_adapter(model)) if structure.masked(model) else ([], 0.0)
    if validation is not None:
        model = placed(model, device) if moves else model
        found = measure(model, *validation, label="Perplexity, before", device=device, streamed=not moves)
        kept |= {"perplexity": {"before": found.perplexity}, "protocol": found.protocol}
        kept["seconds"]["perplexity_before"] = found.seconds
    return kept
