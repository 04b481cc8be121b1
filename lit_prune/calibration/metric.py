"""The metric A = |W_ij| * ||X_j||, the contribution of a weight to its output, shared by several allocations."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def metric_of(weights: dict[str, Tensor], norms: dict[str, Tensor]) -> Tensor:
    """Returns A for every weight of all linears as one flat float32 tensor, in the order of ``weights``.

    [[1, -2]] under norms [3, 4] gives [3, 8].

    Args:
        weights: By linear, each (out, in).
        norms: ||X_j|| by linear, each (in,).
    """
    first = next(iter(weights.values()))
    # filled in place, since concatenating would hold the metric of a block twice
    metric = torch.empty(sum(weight.numel() for weight in weights.values()), device=first.device)
    begin = 0
    for name, weight_OI in weights.items():
        part = metric[begin : begin + weight_OI.numel()].view_as(weight_OI)
        part.copy_(weight_OI).mul_(norms[name].to(metric.device))
        begin += weight_OI.numel()
    return metric.abs_()
