"""The divergence of a student from its teacher: Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

Suffixes: N positions of a batch in a row, R rows of them, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_prune.distill.base import TeacherOutput

CHUNK_TOKENS = 256  # 150,000 words of float32 are 150 MB


def divergence(logits_NV: Tensor, counted_N: Tensor, output: TeacherOutput, temperature: float) -> Tensor:
    """Returns T^2 * sum over the counted positions of KL(q || p), in nats; p = softmax(logits / T), q the teacher.

    Its gradient, T * (p - q), is worked out with it, in float32, a chunk of positions at a time: beside the gradient,
    which has the type of the logits, nothing of their size is made. q = (1/2, 1/2) against p = (1/4, 3/4) at T = 1
    gives log(2 / sqrt 3) = 0.1438.

    Args:
        logits_NV: The student's.
        counted_N: Which positions count, bool.
        output: What the teacher says of the same positions.
        temperature: T.
    """
    return _Divergence.apply(logits_NV, counted_N, output, temperature)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, counted_N: Tensor, output: TeacherOutput, temperature: float) -> Tensor:
        grad_NV = torch.zeros_like(logits_NV)
        total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        for rows_R in torch.where(counted_N)[0].split(CHUNK_TOKENS):
            log_p_RV = torch.log_softmax(logits_NV[rows_R].float() / temperature, dim=-1)
            log_q_RV = output.log_q(rows_R, log_p_RV, temperature)
            q_RV = log_q_RV.exp()
            total += torch.where(q_RV > 0, q_RV * (log_q_RV - log_p_RV), 0).sum()
            grad_NV[rows_R] = (temperature * (log_p_RV.exp() - q_RV)).to(grad_NV.dtype)
        ctx.save_for_backward(grad_NV)
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None, None
