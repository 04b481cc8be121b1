"""Fusing of norms and rotation of weights, as in SliceGPT (ICLR 2024, arXiv 2401.15024, section 3).

Everything is computed in float64 and cast back once. A rotation is given by the K principal axes of the stream that are
kept, the columns of axes_DK: a token's x_D becomes x_D @ axes_DK.
Suffixes: N vocabulary, O rows and I columns of a weight, P unmasked positions, D width of the stream, K axes kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_prune import distributed
from lit_prune.models.remote_code.modeling_sliced import NormWeights, set_weight

ROWS_AT_ONCE = 8192  # to avoid a float64 copy of a whole embedding or head


class Covariance:
    """The uncentred covariance of a signal, X^T X over all positions, in float64."""

    def __init__(self) -> None:
        self.sum_DD: Tensor | None = None

    def update(self, x_PD: Tensor) -> None:
        """Adds the positions of a batch."""
        wide_PD = precise(x_PD)
        sum_DD = wide_PD.T @ wide_PD
        self.sum_DD = sum_DD if self.sum_DD is None else self.sum_DD.add_(sum_DD)

    def principal_axes(self) -> Tensor:
        """Returns the eigenvectors as columns, largest eigenvalue first, (D, D) float64, over all processes.

        The sign of an eigenvector is arbitrary; its largest entry is made positive, so that equal covariances give
        equal axes. Positions [[3, 0], [0, -2]] give [[1, 0], [0, 1]].
        """
        assert self.sum_DD is not None
        axes_DD = torch.linalg.eigh(distributed.all_reduce_sum(self.sum_DD)).eigenvectors.flip(1)
        largest_1D = axes_DD.abs().argmax(0, keepdim=True)
        return axes_DD * axes_DD.gather(0, largest_1D).sign()


def precise(x: Tensor) -> Tensor:
    """Returns ``x`` in float64, on the CPU if its device has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def centred(x: Tensor) -> Tensor:
    """Returns ``x`` minus the mean over its last dimension, as in a LayerNorm; [1, 3] gives [-1, 1]."""
    return x - x.mean(-1, keepdim=True)


def project(x_BTD: Tensor, axes_DK: Tensor) -> Tensor:
    """Returns the stream projected onto ``axes_DK`` in its own dtype, computed in at least float32."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    return (x_BTD.to(wide) @ axes_DK.to(x_BTD.device, wide)).to(x_BTD.dtype)


@torch.no_grad()
def read_along(linear: nn.Module, norm: NormWeights, axes_IK: Tensor | None) -> None:
    """Makes ``linear`` read a stream along other axes, and fuses the preceding norm into it, in place.

    W (scale * n(x)) + W shift + b = (W diag(scale) axes) n(x axes) + (W shift + b), for x that lies within the axes.

    Args:
        linear: W (O, I) and b (O).
        norm: Scale and shift of the norm in front of it.
        axes_IK: The axes that the stream keeps; None keeps all.
    """
    shifts, weights = [], []
    for part_OI in linear.weight.detach().split(ROWS_AT_ONCE):  # type: ignore[operator]
        wide_OI = precise(part_OI)
        if norm.bias is not None:
            shifts.append(wide_OI @ norm.bias.detach().to(wide_OI))
        if norm.weight is not None:
            wide_OI = wide_OI * norm.weight.detach().to(wide_OI)
        if axes_IK is not None:
            wide_OI = wide_OI @ axes_IK.to(wide_OI)
        weights.append(wide_OI.to(part_OI))
    bias_O: Tensor | None = None if linear.bias is None else precise(linear.bias.detach())  # type: ignore[operator]
    if shifts:
        shift_O = torch.cat(shifts)
        bias_O = shift_O if bias_O is None else bias_O + shift_O
    set_weight(linear, torch.cat(weights), None if bias_O is None else bias_O.to(weights[0]))


@torch.no_grad()
def write_along(linear: nn.Module, axes_OK: Tensor | None, *, centre: bool) -> None:
    """Makes ``linear`` write a stream along other axes, in place: axes^T W and axes^T b.

    Args:
        linear: W (O, I) and b (O).
        axes_OK: The axes that the stream keeps; None keeps all.
        centre: First subtract the mean of the output, which the LayerNorm behind it did before it was fused.
    """
    weight_OI: Tensor = precise(linear.weight.detach())  # type: ignore[operator]
    bias_O: Tensor | None = None if linear.bias is None else precise(linear.bias.detach())  # type: ignore[operator]
    if centre:
        weight_OI, bias_O = centred(weight_OI.T).T, None if bias_O is None else centred(bias_O)
    if axes_OK is not None:
        axes_OK = axes_OK.to(weight_OI)
        weight_OI, bias_O = axes_OK.T @ weight_OI, None if bias_O is None else bias_O @ axes_OK
    like: Any = linear.weight
    set_weight(linear, weight_OI.to(like), None if bias_O is None else bias_O.to(like))


@torch.no_grad()
def embed_along(embedding: nn.Module, axes_DK: Tensor, *, centre: bool) -> None:
    """Makes an embedding (N, D) write a stream along other axes, in place; see :func:`write_along`."""
    weight_ND: Tensor = embedding.weight.detach()  # type: ignore[operator]
    axes_DK = axes_DK.to(precise(weight_ND[:0]).device)
    parts = (precise(part) for part in weight_ND.split(ROWS_AT_ONCE))
    rotated = [((centred(part) if centre else part) @ axes_DK).to(weight_ND) for part in parts]
    set_weight(embedding, torch.cat(rotated))
