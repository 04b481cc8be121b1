"""Logits of a model whose blocks are on disk, each of which is read once for all batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.stream import Stream, on_device
from lit_prune.calibration.windows import Batch, inputs_of
from lit_prune.models.families import find_blocks
from lit_prune.models.linears import patched_forward
from lit_prune.progress import track


@torch.no_grad()
def streamed_logits(
    model: PreTrainedModel, batches: Sequence[Batch], device: torch.device, label: str
) -> Iterator[Tensor]:
    """Yields the logits of every batch, (batch, tokens, vocabulary), as ``model`` itself would return them.

    The residual stream of all batches is in memory: tokens * hidden size numbers in the model's dtype.

    Args:
        model: A causal LM of a known family, in eval mode.
        batches: Dicts with `input_ids` and optionally `attention_mask` (for padding) and `position_ids` (if packed).
        device: Device on which blocks compute; embedding and head compute on the model's.
        label: Text of the progress bar over the blocks.
    """
    blocks = find_blocks(model)
    stream = Stream(model, blocks, batches, device)
    for block in track(blocks, label):
        with on_device(block, device):
            stream.run(block, finite=False)
    modules = [block.module for block in blocks]
    for batch, hidden_BTD in zip(batches, stream.hidden, strict=True):
        output = (hidden_BTD, None) if stream.wraps else hidden_BTD
        with patched_forward(modules, lambda *_args, given=output, **_kwargs: given):
            yield model(**inputs_of(batch), use_cache=False).logits
