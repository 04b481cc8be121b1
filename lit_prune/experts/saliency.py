"""The saliency of experts: REAP (arXiv 2510.13999), and which experts have the least.

Suffixes: E experts, S tokens that an expert is given, O size of its output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune import distributed
from lit_prune.calibration.stream import Stream
from lit_prune.experts.mixture import Mixture
from lit_prune.models.families import Block
from lit_prune.models.linears import watching_outputs


@torch.no_grad()
def saliency(stream: Stream, block: Block, mixture: Mixture) -> Tensor:
    """Returns S_j = mean over the tokens that are routed to expert j of |g_j f_j(x)|_2, shape (E,), float64.

    g_j is the router's weight and f_j(x) the expert's output. An expert that no token is routed to has 0. Two tokens
    with outputs [3, 4] and [0, 1] and weights 0.6 and 1 give (0.6 * 5 + 1 * 1) / 2 = 2.

    Args:
        stream: The residual stream in front of the block, which is not advanced.
        block: The block, on the stream's device.
        mixture: Its mixture.
    """
    sums_E, tokens_E = torch.zeros(mixture.count, dtype=torch.float64), torch.zeros(mixture.count, dtype=torch.float64)
    mask_P: Tensor | None = None

    def add(expert: int, y_SO: Tensor, rows_S: Tensor) -> None:
        norm_S = y_SO.float().norm(dim=-1)
        if mask_P is not None:
            norm_S = norm_S[mask_P.to(rows_S.device)[rows_S]]
        sums_E[expert] += norm_S.cpu().double().sum()  # float64 on the CPU, since MPS has none
        tokens_E[expert] += len(norm_S)

    with watching_outputs(mixture.experts, add):
        for index, mask_BT in enumerate(stream.masks):
            mask_P = None if mask_BT is None else mask_BT.flatten()
            stream.output(index, block)
    sums_E, tokens_E = distributed.all_reduce_sum(torch.stack([sums_E, tokens_E]))
    return sums_E / tokens_E.clamp(min=1)


def salient_experts(saliency_E: Tensor, count: int, groups: int = 1) -> list[int]:
    """Returns the ``count`` experts with the highest saliency, ascending, as many of each group.

    Of [3, 1, 0, 2] two are 0 and 3; in the groups [3, 1] and [0, 2] they are the same, of [3, 2] and [0, 1] 0 and 3.

    Args:
        saliency_E: The saliency of every expert.
        count: Number of experts that stay, a multiple of ``groups``.
        groups: Number of groups of neighbours, of which the router of DeepSeek picks some before it picks experts.
    """
    by_group = saliency_E.view(groups, -1)
    order = by_group.argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    offsets = torch.arange(groups)[:, None] * by_group.shape[1]
    return sorted((order + offsets).flatten().tolist())
