"""What removed blocks added to the residual stream, taken over by the MLP in front of them.

ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization, arXiv 2505.02819.
Suffixes: B batch, T tokens, D hidden size, P unmasked positions, O outputs and I inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.calibration.stream import Stream, on_device
from lit_prune.calibration.written import is_added, outputs_of
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import evaluating
from lit_prune.models.families import Block, dense_family
from lit_prune.models.linears import PrunableLinear
from lit_prune.progress import track
from lit_prune.shrink.units.narrow import set_weight
from lit_prune.shrink.units.parts import NoPart, mlp_of


def transformation(gram_DD: Tensor, cross_DD: Tensor, damping: float) -> Tensor:
    """Returns the matrix T, float64, with which M T is the least squares estimate of M + change.

    With M the outputs of the MLP, (tokens, D), and ``change`` what the removed blocks added behind it,

        T = I + (M^T M + a I)^-1 M^T change

    is for a = 0 the solution of ReplaceMe (equation 6), (M^T M)^-1 M^T (h_end + M - h_start). The damping a draws T to
    the identity, which leaves the MLP as it is, and not to 0, which would remove its output where that varies least.
    One token with M = [2, 0] and a change of [1, 1] gives [[1.5, 0.5], [0, 1]] without damping, for a that vanishes.

    Args:
        gram_DD: M^T M.
        cross_DD: M^T change.
        damping: a, as a share of the mean of the diagonal of M^T M.
    """
    gram_DD, cross_DD = gram_DD.cpu().double(), cross_DD.cpu().double()  # on the CPU, since MPS has no float64
    ridge = damping * gram_DD.diagonal().mean()
    gram_DD.diagonal().add_(ridge)
    return torch.eye(len(gram_DD), dtype=torch.float64) + torch.linalg.solve(gram_DD, cross_DD)


@torch.no_grad()
def refit(
    model: PreTrainedModel, blocks: Sequence[Block], gaps: Sequence[Sequence[int]], stream: Stream, damping: float
) -> None:
    """Changes the output weights of the MLP in front of every gap so that it makes up for the gap, in place.

    W_down <- T^T W_down, with the T of :func:`transformation`. The MLP sees the stream as earlier gaps leave it, and is
    fitted to the stream of the dense model behind the gap. In memory are both streams and the outputs of one MLP.

    Args:
        model: The causal LM, with all blocks.
        blocks: Its blocks.
        gaps: Numbers of the blocks of every gap, in order. None begins with block 0.
        stream: A stream of the calibration batches in front of the first block.
        damping: See :func:`transformation`.
    """
    dense, short, begin = stream, stream, 0
    for gap in track(gaps, "Refitting MLPs"):
        block, end = blocks[gap[0] - 1], gap[-1] + 1
        _run([dense] if short is dense else [dense, short], blocks[begin : gap[0] - 1])
        if short is dense:  # the streams are the same up to the first gap
            short = dense.copy()
        writer = _writer(model, block)
        with on_device(block, dense.device, changes=True):
            with outputs_of(writer, dense.offload_device) as outputs:
                short.run(block)
            dense.run(block)
            _run([dense], blocks[gap[0] : end])
            matrix_DD = _solve(outputs, dense, short, damping)
            _transform(writer, matrix_DD)
        _add_change(short, outputs, matrix_DD)
        begin = end


def check_refit(model: PreTrainedModel, blocks: Sequence[Block]) -> None:
    """Raises InputError if a block has no plain MLP, or if its output is not added to the residual stream as it is.

    The latter is tried with four tokens in the first block, unless the model has no weights yet.
    """
    writers = [_writer(model, block) for block in blocks]
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    with evaluating(model), torch.no_grad():
        stream = Stream(model, blocks, [{"input_ids": torch.arange(4)[None]}], model.device)
        added = is_added(stream, blocks[0], writers[0])
    if not added:
        raise _refused(model, "what their MLP writes is not added to the residual stream as it is")


def _run(streams: Sequence[Stream], blocks: Sequence[Block]) -> None:
    """Runs each stream through ``blocks``."""
    for block in blocks:
        with on_device(block, streams[0].device):
            for stream in streams:
                stream.run(block)


def _add_change(stream: Stream, outputs: Sequence[Tensor], matrix_DD: Tensor) -> None:
    """Adds to the stream behind a block what ``matrix_DD`` changes in the outputs of its MLP."""
    change_DD = (matrix_DD - torch.eye(len(matrix_DD))).float().to(stream.offload_device)
    for index, (x_BTD, m_PD) in enumerate(zip(stream.hidden, outputs, strict=True)):
        stream.hidden[index] = x_BTD + (m_PD.float() @ change_DD).view_as(x_BTD).to(x_BTD.dtype)


def _solve(outputs: Sequence[Tensor], dense: Stream, short: Stream, damping: float) -> Tensor:
    """Returns the transformation over the tokens of all processes, float64."""
    gram_DD = cross_DD = torch.zeros(())
    for index, m_PD in enumerate(outputs):
        m_BTD = m_PD.view_as(dense.hidden[index]).to(dense.device).float()
        change_BTD = dense.hidden[index].to(dense.device).float() - short.hidden[index].to(dense.device).float()
        m_PD, change_PD = dense.unmasked(index, m_BTD), dense.unmasked(index, change_BTD)
        # in float64 the order of the sum hardly matters: one process and several find the same weights
        gram_DD = gram_DD + (m_PD.T @ m_PD).cpu().double()
        cross_DD = cross_DD + (m_PD.T @ change_PD).cpu().double()
    return transformation(distributed.all_reduce_sum(gram_DD), distributed.all_reduce_sum(cross_DD), damping)


def _transform(writer: PrunableLinear, matrix_DD: Tensor) -> None:
    """Replaces W_OI by T^T W, and the bias by T^T b."""
    module: Any = writer.module
    device = module.weight.device
    bias_O = None if module.bias is None else (matrix_DD.T @ module.bias.detach().cpu().double()).to(device)
    set_weight(writer, (matrix_DD.T @ writer.weight_OI.cpu().double()).to(device), bias_O)


def _writer(model: PreTrainedModel, block: Block) -> PrunableLinear:
    """Returns the linear that writes the output of a block's MLP."""
    try:
        return block.linears[mlp_of(block.linears, model.config.get_text_config()).writer]
    except NoPart as reason:
        raise _refused(model, str(reason)) from reason


def _refused(model: PreTrainedModel, reason: str) -> InputError:
    return InputError(f"`Depth.refit` must be false for the family {dense_family(model.config)!r}: {reason}.")
