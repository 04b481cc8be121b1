"""Calibration windows run through a model one block at a time, while an Observer accumulates statistics.

Only one block, one batch and the statistics are on the accelerator at a time; everything else stays on the model's
device.
Suffixes: N windows, B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.calibration.statistics import BlockStatistics, Observer
from lit_prune.calibration.windows import Batch, inputs_of
from lit_prune.errors import InputError
from lit_prune.models.families import Block
from lit_prune.models.linears import patched_forward

Forward = Callable[..., Tensor | tuple[Any, ...]]
Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]


class Stream:
    """The residual stream of all calibration batches in front of one block of a model.

    The constructor embeds the batches with every block short-circuited and records the arguments of every block, since
    masks and rotary embeddings depend on the layer's type and on the batch. :meth:`run` advances the stream by one
    block.

    Args:
        model: A causal LM in eval mode.
        blocks: Its blocks.
        batches: Dicts of `input_ids` (batch, tokens) and, where there is padding, `attention_mask`.
        device: Device on which blocks compute.

    Attributes:
        hidden: The residual stream of every batch, (B, T, D), on the model's device.
        wraps: Whether the model's blocks return tuples.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch], device: torch.device
    ) -> None:
        self.device, self.batches = device, batches
        self.offload_device = model.device
        self.masks: list[Tensor | None] = [_mask(batch) for batch in batches]
        self.hidden: list[Tensor] = []
        self.arguments: list[Arguments] = []
        capture = _Capture(model, [block.module for block in blocks])
        for batch in batches:
            inputs, arguments = capture({key: value.to(self.offload_device) for key, value in batch.items()})
            self.hidden.append(inputs)
            self.arguments.append([reuse_equal(new, old) for new, old in self._paired_with_last(arguments)])
        self.wraps = bool(capture.wraps)
        self._index: int | None = None  # of the batch in a block

    def _paired_with_last(self, arguments: Arguments) -> Iterable[tuple[Any, Any]]:
        return zip(arguments, self.arguments[-1] if self.arguments else [None] * len(arguments), strict=True)

    @torch.no_grad()
    def run(self, block: Block, observer: Observer | None = None, *, advance: bool = True, finite: bool = True) -> None:
        """Runs every batch through ``block``, which must be on the stream's device.

        Args:
            block: The block that the stream is in front of.
            observer: Accumulates the block's statistics; None computes none.
            advance: Replace the hidden states by the block's outputs.
            finite: Check that the outputs are finite.

        Raises:
            InputError: if ``finite`` and the block returns NaN or infinity.
        """
        for index, x_BTD in enumerate(self.hidden):
            mask_BT = self.masks[index]
            if observer is not None:
                observer.mask_BT = None if mask_BT is None else mask_BT.to(self.device)
            y_BTD = self.output(index, block)
            if finite:
                _check_finite(y_BTD, block, index)
            if observer is not None:
                observer.add_block(x_BTD.to(self.device), y_BTD)
            if advance:
                self.hidden[index] = y_BTD.to(self.offload_device)

    def output(self, index: int, block: Block, forward: Forward | None = None) -> Tensor:
        """Returns the output of ``block`` for batch ``index``, on the stream's device.

        Args:
            index: Number of the batch.
            block: The block that the stream is in front of, on the stream's device.
            forward: Function that is called in the place of the block.
        """
        args, kwargs = move_data_to_device(self.arguments[index][block.index], self.device)
        self._index = index
        try:
            return unwrap((forward or block.module)(self.hidden[index].to(self.device), *args, **kwargs))
        finally:
            self._index = None

    @contextmanager
    def once(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Computes modules of a block once per batch for the context: later passes get copies of their first outputs.

        For modules whose inputs and weights do not change in between, such as the attention while the MLP is cut. Of
        the weights that eager attention returns, (B, heads, T, T), which no block reads, later passes get None. A
        module that returns other tensors than these beside the first is computed in every pass.

        Args:
            modules: Modules of the block that the stream is in front of, each called at most once per batch.
        """
        with ExitStack() as patched:
            for module in modules:
                patched.enter_context(patched_forward([module], self._once(module.forward)))
            yield

    def _once(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that calls ``forward`` once per batch of this stream, and always for others."""
        found: dict[int, tuple[Tensor, Any]] = {}

        def first_output(*args: Any, **kwargs: Any) -> Any:
            index = self._index
            if index in found:
                first, rest = found[index]
                first = first.to(self.device, copy=True)  # a block may add to it in place
                return first if rest is None else (first, *rest)
            output = forward(*args, **kwargs)
            first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            if rest is not None:
                rest = tuple(None if isinstance(each, Tensor) and each.ndim == 4 else each for each in rest)
            if index is not None and not any(isinstance(each, Tensor) for each in rest or ()):
                found[index] = first.to(self.offload_device, copy=True), rest
            return output

        return first_output

    def restarted(self, model: PreTrainedModel, blocks: Sequence[Block]) -> Stream:
        """Returns the stream of the same batches in front of the first block of ``model``, whose shape has changed."""
        return Stream(model, blocks, self.batches, self.device)

    def copy(self) -> Stream:
        """Returns a stream at the same block that advances by itself; tensors are shared until one of them does."""
        other = copy.copy(self)
        other.hidden = list(self.hidden)
        return other

    @torch.no_grad()
    def map(self, work: Callable[..., Tensor], block: Block | None = None) -> None:
        """Replaces the hidden states of every batch by the result of ``work``.

        Args:
            work: Function of the batch's index, its hidden states on the stream's device and the keyword arguments of
                ``block``.
            block: The block that the stream is in front of.

        Raises:
            InputError: if ``work`` returns NaN or infinity for a block.
        """
        for index, x_BTD in enumerate(self.hidden):
            kwargs = {} if block is None else self.arguments[index][block.index][1]
            y_BTD = work(index, x_BTD.to(self.device), **move_data_to_device(kwargs, self.device))
            if block is not None:
                _check_finite(y_BTD, block, index)
            self.hidden[index] = y_BTD.to(self.offload_device)

    def tokens(self) -> int:
        """Returns the number of unmasked positions of all batches, over all processes."""
        masks = zip(self.hidden, self.masks, strict=True)
        own = sum(x_BTD[..., 0].numel() if mask_BT is None else int(mask_BT.sum()) for x_BTD, mask_BT in masks)
        return distributed.all_reduce_count(own)

    def unmasked(self, index: int, x_BTD: Tensor) -> Tensor:
        """Returns the unmasked positions of batch ``index``, (P, D)."""
        mask_BT = self.masks[index]
        return x_BTD.flatten(0, -2) if mask_BT is None else x_BTD[mask_BT.to(x_BTD.device)]


def _check_finite(y_BTD: Tensor, block: Block, index: int) -> None:
    if not torch.isfinite(y_BTD.sum(dtype=torch.float32)):
        raise InputError(
            f"`calibration`: block {block.index} gives NaN or infinity on calibration batch {index}; the weights are "
            "broken, or `model.dtype` is too small for them (try float32 or bfloat16)."
        )


def observe(
    stream: Stream, block: Block, wanted: frozenset[str], *, advance: bool = True, constant: bool = False
) -> BlockStatistics:
    """Returns the ``wanted`` statistics of ``block`` over the whole stream; for ``constant`` see :class:`Observer`."""
    with Observer(block, wanted, constant=constant).watching() as observer:
        stream.run(block, observer, advance=advance)
    return observer.statistics()


@contextmanager
def on_device(block: Block, device: torch.device, *, changes: bool = False) -> Iterator[Block]:
    """Moves one block to ``device`` for the context, then back.

    Args:
        block: The block.
        device: Device on which it computes.
        changes: Whether the context changes its weights; a block on disk is then written back.
    """
    if block.offload is not None:
        with block.offload.onloaded(block.path, block.module, device, changes=changes):
            yield block
        return
    original_device = next(block.module.parameters()).device
    block.module.to(device)
    try:
        yield block
    finally:
        block.module.to(original_device)


def unwrap(output: Tensor | tuple[Any, ...]) -> Tensor:
    """Returns the hidden states in a block's output, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


class _Capture:
    """Embeds batches with every block short-circuited, recording block 0's input and every block's other arguments.

    A patched forward must return a tensor or a tuple, whichever the block itself does: Falcon takes ``outputs[0]``,
    which for a tensor would be its first row. This is known only from a call, so the first block runs once.
    """

    def __init__(self, model: PreTrainedModel, modules: Sequence[nn.Module]) -> None:
        self.model, self.modules = model, modules
        self.first = modules[0].forward
        self.wraps: bool | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Arguments]:
        hidden: list[Tensor] = []
        arguments: Arguments = []

        def recorder(x_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
            if self.wraps is None:
                self.wraps = isinstance(self.first(x_BTD, *args, **kwargs), tuple)
            hidden.append(x_BTD)
            arguments.append((args, kwargs))
            return (x_BTD, None) if self.wraps else x_BTD

        with patched_forward(self.modules, recorder):
            self.model.base_model(**inputs_of(batch), use_cache=False)
        return hidden[0], arguments


def reuse_equal(new: Any, old: Any) -> Any:
    """Returns ``new`` with the tensors of ``old`` in place of equal ones, so that each is in memory once."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and new.shape == old.shape and torch.equal(new, old)
        return old if same else new
    if isinstance(new, tuple):
        counterparts = old if isinstance(old, tuple) and len(old) == len(new) else (None,) * len(new)
        return tuple(reuse_equal(item, other) for item, other in zip(new, counterparts, strict=True))
    if isinstance(new, dict):
        by_key = old if isinstance(old, dict) else {}
        return {key: reuse_equal(value, by_key.get(key)) for key, value in new.items()}
    return new
