"""Runs calibration windows through a model one block at a time, and takes the statistics that are asked for.

At any time one block, one batch and the statistics are on the accelerator; the rest stays where it was. Positions
whose attention mask is 0 are left out of every statistic.
Suffixes: N windows, B batch, T tokens, D hidden size, I input channels, P positions that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.families import Block

INPUTS = "inputs"
COSINE = "cosine"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """How much text the statistics are taken over.

    Args:
        num_samples: Number of windows.
        seq_length: Tokens per window.
        seed: Seed of the draw.
        batch_size: Windows per forward pass.

    Raises:
        InputError: for a number below 1 (`seq_length`: below 2).
    """

    num_samples: int = 128
    seq_length: int = 2048
    seed: int = 0
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, least in {"num_samples": 1, "seq_length": 2, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"`calibration.{name}` must be at least {least}, got {getattr(self, name)}.")


class Windows(NamedTuple):
    """Calibration windows and where in the token stream each begins."""

    input_ids_NT: Tensor
    positions: list[int]


def draw_windows(stream: Tensor, num_samples: int, seq_length: int, seed: int) -> Windows:
    """Returns windows drawn without replacement from the grid of non-overlapping windows over a token stream.

    Ten tokens and a `seq_length` of 3 make a grid of three windows, at 0, 3 and 6.

    Args:
        stream: Token ids, shape (tokens,).
        num_samples: N, how many to draw.
        seq_length: T, tokens per window.
        seed: Seed of the draw.

    Raises:
        InputError: if there are fewer windows than asked for.
    """
    available = stream.numel() // seq_length
    if num_samples > available:
        raise InputError(
            f"`calibration.num_samples` must be at most {available}, the number of windows of {seq_length} tokens in "
            f"the training text ({stream.numel()} tokens), got {num_samples}."
        )
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
    grid_NT = stream[: available * seq_length].view(available, seq_length)
    return Windows(grid_NT[drawn].long(), [int(index) * seq_length for index in drawn])


def batches_of(windows: Windows, batch_size: int) -> list[Batch]:
    """Returns ``windows`` as batches of at most ``batch_size``."""
    return [{"input_ids": part} for part in windows.input_ids_NT.split(batch_size)]


def first_batches(loader: Iterable[Any], calibration: Calibration) -> list[Batch]:
    """Returns the first ``num_samples`` rows of a dataloader, as it batches them, cut to ``seq_length`` tokens.

    Args:
        loader: Gives mappings with `input_ids` (batch, tokens) and, where there is padding, `attention_mask`.
        calibration: How many rows and tokens.

    Raises:
        InputError: if the loader gives something else, or too few rows.
    """
    batches, rows = [], 0
    for batch in loader:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise InputError(
                "`calibration`: batches of the training dataloader must be dicts with a tensor `input_ids`, got "
                f"{type(batch).__name__}."
            )
        take = (slice(calibration.num_samples - rows), slice(calibration.seq_length))
        batches.append({key: batch[key][take] for key in ("input_ids", "attention_mask") if key in batch})
        rows += len(batches[-1]["input_ids"])
        if rows == calibration.num_samples:
            return batches
    raise InputError(
        f"`calibration.num_samples` must be at most {rows}, the rows that the training dataloader gives, got "
        f"{calibration.num_samples}."
    )


@dataclass
class Observed:
    """What passed through one block: root mean square of every linear's input channels, and the block's cosine.

    Attributes:
        norms: ||X_j|| by linear, shape (I,), fp32: the root mean square over the tokens that the linear saw.
        cosine: mean over tokens of cos(block's input, block's output); None if it was not asked for.
    """

    norms: dict[str, Tensor] = field(default_factory=dict)
    cosine: float | None = None


class InputSquares:
    """Sum of squares of every input channel of one linear, over the positions that count."""

    def __init__(self) -> None:
        self.sum_I: Tensor | None = None
        self.tokens = 0

    def update(self, x_PI: Tensor) -> None:
        """Adds positions, in fp32."""
        sum_I = x_PI.float().square().sum(0)
        self.sum_I = sum_I if self.sum_I is None else self.sum_I + sum_I
        self.tokens += len(x_PI)

    def norm(self) -> Tensor:
        """Returns the root mean square, shape (I,); channels [3, 4] seen in one token give [3, 4]."""
        assert self.sum_I is not None
        return (self.sum_I / max(self.tokens, 1)).sqrt()


class Observer:
    """Takes the wanted statistics of one block while batches run through it.

    Linears that are given the same tensor (q, k, v; gate, up) share one statistic: on the first batch they are told
    apart by the identity of what they are given.
    """

    def __init__(self, block: Block, wanted: frozenset[str]) -> None:
        self.wanted = wanted
        self.mask_BT: Tensor | None = None
        self._linears = block.linears if INPUTS in wanted else {}
        self._leader: dict[str, str] = {}
        self._squares: dict[str, InputSquares] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._cosine, self._tokens = 0.0, 0

    @contextmanager
    def watching(self) -> Iterator[Observer]:
        """Hooks the linears for as long as the context lasts."""
        handles = [
            linear.register_forward_pre_hook(lambda _module, args, name=name: self._see(name, args[0]))
            for name, linear in self._linears.items()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, x_BTI: Tensor) -> None:
        if name not in self._leader:
            leader, _ = self._seen.setdefault(id(x_BTI), (name, x_BTI))  # holding x keeps its id from being reused
            self._leader[name] = leader
            self._squares.setdefault(leader, InputSquares())
        if self._leader[name] == name:
            self._squares[name].update(self._counted(x_BTI))

    def see_block(self, x_BTD: Tensor, y_BTD: Tensor) -> None:
        """Adds the cosine of a block's input and output, and forgets what told the linears of a batch apart."""
        self._seen.clear()
        if COSINE in self.wanted:
            cosine_P = F.cosine_similarity(self._counted(x_BTD).float(), self._counted(y_BTD).float(), dim=-1)
            self._cosine += float(cosine_P.cpu().double().sum())
            self._tokens += len(cosine_P)

    def _counted(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.flatten(0, -2) if self.mask_BT is None else x_BTD[self.mask_BT]

    def observed(self) -> Observed:
        """Returns the statistics over everything that was seen."""
        shared = {leader: squares.norm() for leader, squares in self._squares.items()}
        norms = {name: shared[leader] for name, leader in self._leader.items()}
        return Observed(norms, self._cosine / self._tokens if self._tokens else None)


class Stream:
    """The residual stream of all calibration batches, standing between two blocks of a model.

    Making one embeds the batches with every block short-circuited, and records what each block is called with: masks
    and rotary embeddings differ by the layer's type and by the batch. :meth:`run` takes the stream through one block.

    Args:
        model: A causal LM in eval mode.
        blocks: Its blocks.
        batches: Dicts of `input_ids` (batch, tokens) and, where there is padding, `attention_mask`.
        device: Where a block computes.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch], device: torch.device
    ) -> None:
        self.device = device
        self.home = model.device
        self.masks: list[Tensor | None] = [_mask(batch) for batch in batches]
        self.hidden: list[Tensor] = []
        self.arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        modules = [block.module for block in blocks]
        for batch in batches:
            inputs, arguments = _capture(model, modules, {k: v.to(self.home) for k, v in batch.items()})
            self.hidden.append(inputs)
            self.arguments.append([_share(now, before) for now, before in self._beside_last(arguments)])

    def _beside_last(self, arguments: list[Any]) -> Iterable[tuple[Any, Any]]:
        return zip(arguments, self.arguments[-1] if self.arguments else [None] * len(arguments), strict=True)

    @torch.no_grad()
    def run(self, block: Block, observer: Observer | None = None, *, advance: bool = True) -> None:
        """Runs every batch through ``block``, which must be on the stream's device.

        Args:
            block: The block that the stream stands before.
            observer: Takes statistics on the way.
            advance: Put the block's outputs in the place of its inputs.

        Raises:
            InputError: if the block gives NaN or infinity.
        """
        for index, x_BTD in enumerate(self.hidden):
            args, kwargs = move_data_to_device(self.arguments[index][block.index], self.device)
            x_BTD = x_BTD.to(self.device)
            mask_BT = self.masks[index]
            if observer is not None:
                observer.mask_BT = None if mask_BT is None else mask_BT.to(self.device)
            y_BTD = unwrap(block.module(x_BTD, *args, **kwargs))
            _check_finite(y_BTD, block, index)
            if observer is not None:
                observer.see_block(x_BTD, y_BTD)
            if advance:
                self.hidden[index] = y_BTD.to(self.home)

    @torch.no_grad()
    def map(self, work: Callable[..., Tensor], block: Block | None = None) -> None:
        """Puts what ``work`` makes of every batch's hidden states in their place.

        Args:
            work: Is given the batch's index, its hidden states on the stream's device and, by keyword, the arguments
                that ``block`` is called with.
            block: The block that the stream stands before.

        Raises:
            InputError: if NaN or infinity comes out of a block.
        """
        for index, x_BTD in enumerate(self.hidden):
            kwargs = {} if block is None else self.arguments[index][block.index][1]
            y_BTD = work(index, x_BTD.to(self.device), **move_data_to_device(kwargs, self.device))
            if block is not None:
                _check_finite(y_BTD, block, index)
            self.hidden[index] = y_BTD.to(self.home)

    def counted(self, index: int, x_BTD: Tensor) -> Tensor:
        """Returns the positions of batch ``index`` that count, (P, D)."""
        mask_BT = self.masks[index]
        return x_BTD.flatten(0, -2) if mask_BT is None else x_BTD[mask_BT.to(x_BTD.device)]


def _check_finite(y_BTD: Tensor, block: Block, index: int) -> None:
    if not torch.isfinite(y_BTD.sum(dtype=torch.float32)):
        raise InputError(
            f"`calibration`: block {block.index} gives NaN or infinity on calibration batch {index}; the weights are "
            "broken, or `model.dtype` is too small for them (try float32 or bfloat16)."
        )


def observe(stream: Stream, block: Block, wanted: frozenset[str], *, advance: bool = True) -> Observed:
    """Returns the wanted statistics of ``block`` over the whole stream."""
    with Observer(block, wanted).watching() as observer:
        stream.run(block, observer, advance=advance)
    return observer.observed()


@contextmanager
def on_device(block: Block, device: torch.device) -> Iterator[Block]:
    """Moves one block to the accelerator, and back where it was."""
    home = next(block.module.parameters()).device
    block.module.to(device)
    try:
        yield block
    finally:
        block.module.to(home)


def unwrap(output: Tensor | tuple[Any, ...]) -> Tensor:
    """Returns the hidden states of a block's output, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


@torch.no_grad()
def _capture(
    model: PreTrainedModel, modules: Sequence[nn.Module], batch: Batch
) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Embeds a batch with every block short-circuited; returns block 0's input and every block's other arguments."""
    hidden: list[Tensor] = []
    arguments = []

    def recorder(x_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden.append(x_BTD)
        arguments.append((args, kwargs))
        return x_BTD

    own = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = recorder
    try:
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
    return hidden[0], arguments


def _share(now: Any, before: Any) -> Any:
    """Returns ``now`` with every tensor that equals its counterpart in ``before`` replaced by that one."""
    if isinstance(now, Tensor):
        same = isinstance(before, Tensor) and now.shape == before.shape and torch.equal(now, before)
        return before if same else now
    if isinstance(now, tuple):
        pairs = before if isinstance(before, tuple) and len(before) == len(now) else (None,) * len(now)
        return tuple(_share(item, other) for item, other in zip(now, pairs, strict=True))
    if isinstance(now, dict):
        counterparts = before if isinstance(before, dict) else {}
        return {key: _share(value, counterparts.get(key)) for key, value in now.items()}
    return now
