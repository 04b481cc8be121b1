"""The activation of the stream's dimensions, by which they are chosen: Minitron (arXiv 2407.14679).

Suffixes: B batch, T tokens, P unmasked positions, D width of the stream, K dimensions that stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune import distributed
from lit_prune.calibration.stream import Stream, on_device, unwrap
from lit_prune.models.families import Block
from lit_prune.models.remote_code.modeling_sliced import Layout
from lit_prune.progress import track


@contextmanager
def last_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that always has the last output of each module, by the module's name."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_hook(
                lambda _module, _args, output, name=name: outputs.__setitem__(name, output)
            )
            stack.callback(hook.remove)
        yield outputs


@torch.no_grad()
def mean_activation(stream: Stream, blocks: Sequence[Block], layout: Layout, device: torch.device) -> Tensor:
    """Returns the mean of |n(x)_d| over tokens and the norms n of all blocks, shape (D,), float64.

    Norms that return [3, -4] for one token and [1, 0] for the other give [2, 2].

    Args:
        stream: The residual stream in front of the first block, which is advanced to the end.
        blocks: The blocks.
        layout: Where their norms are.
        device: Device on which a block computes.
    """
    total_D = torch.zeros(stream.hidden[0].shape[-1], dtype=torch.float64)
    for block in track(blocks, "Scoring dimensions"):
        norms = {step.norm: block.module.get_submodule(step.norm) for step in layout.steps}
        with on_device(block, device), last_outputs(norms) as outputs:

            def run(index: int, x_BTD: Tensor, block: Block = block, outputs: Any = outputs, **kwargs: Any) -> Tensor:
                y_BTD = unwrap(block.module(x_BTD, **kwargs))
                for output_BTD in outputs.values():
                    size_PD = stream.unmasked(index, output_BTD).float().abs()
                    total_D.add_(size_PD.sum(0).cpu().double())  # float64 on the CPU, since MPS has none
                return y_BTD

            stream.map(run, block)
    return distributed.all_reduce_sum(total_D) / (stream.tokens() * len(blocks) * len(layout.steps))


def most_active(activation_D: Tensor, width: int) -> Tensor:
    """Returns the ``width`` dimensions with the largest activation, ascending; of [3, 1, 2] two are 0 and 2."""
    return activation_D.argsort(descending=True, stable=True)[:width].sort().values
