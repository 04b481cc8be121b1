"""The divergence of a student from its teacher (Distilling the Knowledge in a Neural Network, arXiv 1503.02531).

Suffixes: N positions of a batch, flattened; R rows selected from them; V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_prune.distill.base import TeacherOutput
from lit_prune.models.tensors import rows_at_once


def divergence(logits_NV: Tensor, counted_N: Tensor, output: TeacherOutput, temperature: float) -> Tensor:
    """Returns T^2 * sum over the counted positions of KL(q || p), in nats, p = softmax(logits / T), q the teacher's.

    q = (1/2, 1/2) against p = (1/4, 3/4) at T = 1 gives log(2 / sqrt 3) = 0.1438.

    Args:
        logits_NV: The student's logits.
        counted_N: Mask of the positions that count, bool.
        output: The teacher's output for the same positions.
        temperature: T.
    """
    return _Divergence.apply(logits_NV, counted_N, output, temperature)


class _Divergence(torch.autograd.Function):
    # The gradient, T * (p - q), is computed in the forward pass, in float32, for a chunk of positions at a time. It is
    # the only tensor as large as the logits, in their type; autograd would keep several for the backward pass.

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, counted_N: Tensor, output: TeacherOutput, temperature: float) -> Tensor:
        grad_NV = torch.zeros_like(logits_NV)
        total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        for rows_R in torch.where(counted_N)[0].split(rows_at_once(logits_NV)):
            log_p_RV = torch.log_softmax(logits_NV[rows_R].float() / temperature, dim=-1)
            log_q_RV = output.log_q(rows_R, log_p_RV, temperature)
            q_RV = log_q_RV.exp()
            # q log q is 0 at q = 0, where the product of 0 and -inf would be NaN
            total += (log_q_RV - log_p_RV).masked_fill_(q_RV == 0, 0).mul_(q_RV).sum()
            grad_NV[rows_R] = log_p_RV.exp_().sub_(q_RV).mul_(temperature).to(grad_NV.dtype)
        ctx.save_for_backward(grad_NV)
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None, None
