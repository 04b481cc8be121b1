"""How much the residual stream changes over a run of blocks: 1 - cos of what goes in and what comes out.

Suffixes: B batch, T tokens, D hidden size, P unmasked positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_prune import distributed
from lit_prune.calibration.stream import Stream, on_device
from lit_prune.models.families import Block
from lit_prune.progress import track


@torch.no_grad()
def distances(stream: Stream, blocks: Sequence[Block], length: int) -> list[float]:
    """Returns the distance of the input and the output of every run of ``length`` neighbouring blocks.

    It is 1 - the mean over tokens of cos(input of the first block, output of the last): the Block Influence of ShortGPT
    (arXiv 2403.03853, equation 1) for one block, and for more the cosine of *The Unreasonable Ineffectiveness of the
    Deeper Layers* (arXiv 2403.17887, section 3.2). The stream in front of ``length`` + 1 blocks is in memory at once.

    Args:
        stream: A stream of the calibration batches in front of the first block; it ends behind the last.
        blocks: The blocks.
        length: Number of blocks of a run.
    """
    inputs = deque([list(stream.hidden)])
    found = []
    for block in track(blocks, "Comparing blocks"):
        with on_device(block, stream.device):
            stream.run(block)
        inputs.append(list(stream.hidden))
        if len(inputs) > length:
            found.append(1 - _mean_cosine(stream, inputs.popleft()))
    return found


def _mean_cosine(stream: Stream, before: Sequence[Tensor]) -> float:
    """Returns the mean over the tokens of all processes of the cosine of the stream and what it was ``before``."""
    total, tokens = 0.0, 0
    for index, (x_BTD, y_BTD) in enumerate(zip(before, stream.hidden, strict=True)):
        x_PD, y_PD = stream.unmasked(index, x_BTD), stream.unmasked(index, y_BTD)
        cosine_P = F.cosine_similarity(x_PD.float(), y_PD.float(), dim=-1)
        total += float(cosine_P.cpu().double().sum())  # float64 on the CPU, since MPS has none
        tokens += len(cosine_P)
    total, tokens = distributed.all_reduce_sum(torch.tensor([total, tokens], dtype=torch.float64)).tolist()
    return total / tokens
