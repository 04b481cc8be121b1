"""The activations between the blocks of a plain forward."""

import torch
from transformers import PreTrainedModel

from lit_prune.calibration.stream import unwrap
from tests.conftest import blocks_of


def hidden_by_block(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every block in one plain forward."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _m, args, out: seen.append((args[0], unwrap(out))))
        for layer in blocks_of(model)
    ]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen
