"""The reconstruction of all blocks of a cut, one after the other.

In memory are, besides the model, the hidden states of all batches twice, and on the stream's device one block in
float32 with its gradients and two moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from lit_prune import distributed
from lit_prune.calibration.stream import Stream
from lit_prune.errors import InputError
from lit_prune.models.families import Block
from lit_prune.progress import log
from lit_prune.reconstruct.finished import FinishedBlocks
from lit_prune.reconstruct.losses import BlockLosses, MeanError, relative_errors
from lit_prune.reconstruct.settings import Reconstruct
from lit_prune.reconstruct.training import BlockTraining

HELD_OUT = 8  # one batch in so many is held out
LR_SHARES = (1, 1 / 4, 1 / 16)  # of the learning rate, until the held-out loss of a block is smaller


class Reconstruction:
    """The reconstruction of the blocks of one model, in their order, while a method cuts them.

    Args:
        settings: The settings.
        stream: The stream of the calibration batches, in front of the first block.
        finished: The blocks that were reconstructed before an interrupt; None keeps none.

    Attributes:
        stream: The stream behind the blocks that were cut so far.
        dense: The stream of the dense blocks, from which the targets are; while a block is cut, it is behind that
            block. None if the dense blocks read what the pruned ones pass on.
        losses: The losses of these blocks.

    Raises:
        InputError: if there is only one batch.
    """

    def __init__(self, settings: Reconstruct, stream: Stream, finished: FinishedBlocks | None = None) -> None:
        self.settings, self.stream, self.finished = settings, stream, finished
        self.losses: list[BlockLosses] = []
        self.dense = stream.copy() if settings.targets_from == "dense" else None
        self._training, self._held_out = _divided(len(stream.hidden))

    @contextmanager
    def block(self, block: Block) -> Iterator[None]:
        """Reconstructs ``block`` after the body, which cuts it, and advances the stream by it.

        Args:
            block: The block that the stream is in front of, on the stream's device.
        """
        targets = self._targets(block)
        yield
        if self.finished is not None and block in self.finished:
            self.losses.append(self.finished.restore(block))
            self.stream.run(block)
            return
        self.losses.append(self._reconstruct(block, targets))
        if self.finished is not None:
            self.finished.add(block, self.losses[-1])

    def note(self) -> str:
        """Returns the losses of the last block as text, for a progress bar."""
        last = self.losses[-1]
        return f"loss of block {len(self.losses) - 1}: {last.held_out_before:.4f} to {last.held_out_after:.4f}"

    @torch.no_grad()
    def _targets(self, block: Block) -> Sequence[Tensor]:
        """Returns the output of the block, which is not cut yet, for every batch."""
        if self.dense is not None:
            self.dense.run(block)
            return self.dense.hidden
        stream = self.stream
        return [stream.output(index, block).to(stream.offload_device) for index in range(len(stream.hidden))]

    @torch.no_grad()
    def _reconstruct(self, block: Block, targets: Sequence[Tensor]) -> BlockLosses:
        """Trains ``block`` and advances the stream; its weights come back if the held-out loss is not smaller.

        Adam changes every weight by about the learning rate, however small the error of the cut is: what repairs a
        heavy cut is more than a light one allows. Before it is given up, a block is trained with smaller rates.
        """
        before = [self._loss(block, targets, batches) for batches in (self._training, self._held_out)]
        for share in LR_SHARES:
            held_out = self._train(block, targets, share, before[1])
            if held_out < before[1]:
                return BlockLosses(before[0], self._advance(block, targets), before[1], held_out, kept=True)
            if held_out == before[1]:  # there is nothing to train
                break
        self.stream.run(block)
        log(
            f"Block {block.index} keeps the weights of the cut: its loss on held-out windows went from "
            f"{before[1]:.4g} to {held_out:.4g}, at the smallest learning rate that was tried."
        )
        return BlockLosses(before[0], before[0], before[1], held_out, kept=False)

    def _train(self, block: Block, targets: Sequence[Tensor], share: float, before: float) -> float:
        """Trains ``block`` with a share of the learning rate, unless that does not help; returns its held-out loss."""
        settings = replace(self.settings, lr=share * self.settings.lr)
        trained = BlockTraining(settings, self.stream, block, targets).run(self._training)
        original = {name: block.module.get_parameter(name).detach().clone() for name in trained}
        _write(block, trained)
        held_out = self._loss(block, targets, self._held_out)
        if not held_out < before:
            _write(block, original)
        return held_out

    def _advance(self, block: Block, targets: Sequence[Tensor]) -> float:
        """Advances the stream by ``block``, and returns the mean loss of a token over the training batches."""
        loss = MeanError()
        for index in range(len(self.stream.hidden)):
            y_BTD = self.stream.output(index, block)
            if index in self._training:
                target_BTD = targets[index].to(self.stream.device)
                loss.add(*relative_errors(y_BTD, target_BTD, self.stream.masks[index]))
            self.stream.hidden[index] = y_BTD.to(self.stream.offload_device)
        return loss.mean()

    def _loss(self, block: Block, targets: Sequence[Tensor], batches: Sequence[int]) -> float:
        """Returns the mean loss of a token over ``batches``."""
        loss = MeanError()
        for index in batches:
            target_BTD = targets[index].to(self.stream.device)
            loss.add(*relative_errors(self.stream.output(index, block), target_BTD, self.stream.masks[index]))
        return loss.mean()


def reconstructing(reconstruction: Reconstruction | None, block: Block) -> AbstractContextManager[None]:
    """Returns the context in which a method cuts ``block``; it does nothing without a ``reconstruction``."""
    return nullcontext() if reconstruction is None else reconstruction.block(block)


def check_batches(number: int) -> None:
    """Raises InputError if there are too few calibration batches to hold one out."""
    if number < 2:
        raise InputError(
            f"`pruning.reconstruction` must have at least two calibration batches, one of which is held out, got "
            f"{number}: raise `calibration.num_samples`, or lower `calibration.batch_size`."
        )


def _divided(batches: int) -> tuple[list[int], list[int]]:
    """Returns the numbers of the batches of this process to train on, and of those that are held out.

    Held out is the last eighth of the batches of all processes, of which ``batches`` are of this one.
    """
    total = distributed.all_reduce_count(batches)
    check_batches(total)
    first_held_out = total - max(total // HELD_OUT, 1)
    numbers = [distributed.rank() + index * distributed.world_size() for index in range(batches)]
    training = [index for index, number in enumerate(numbers) if number < first_held_out]
    return training, list(range(len(training), batches))


def _write(block: Block, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        block.module.get_parameter(name).detach().copy_(weight)
