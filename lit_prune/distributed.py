"""Several processes that hold the same model and share out the calibration windows: sums, and what all must agree on.

Everything here does nothing in one process. torch.distributed says how many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lit_prune.errors import InputError

Item = TypeVar("Item")
_alone: ContextVar[bool] = ContextVar("alone", default=False)


def number() -> int:
    """Returns how many processes there are."""
    together = dist.is_available() and dist.is_initialized() and not _alone.get()
    return dist.get_world_size() if together else 1


def rank() -> int:
    """Returns which of them this is, from 0."""
    return dist.get_rank() if number() > 1 else 0


def first() -> bool:
    """Returns whether this process is the one that prints and writes, also within :func:`alone`."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def single_process() -> Iterator[None]:
    """Lets this process work by itself for as long as the context lasts: the others do not take part."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def share(items: Sequence[Item]) -> list[Item]:
    """Returns this process's part of ``items``, every so-manieth: of [a, b, c] and two processes [a, c], and [b].

    Raises:
        InputError: if there are fewer than there are processes.
    """
    check_shares(len(items))
    return list(items[rank() :: number()])


def check_shares(batches: int) -> None:
    """Raises InputError where calibration has fewer batches than there are processes."""
    if batches < number():
        raise InputError(
            f"`calibration.num_samples` must give every process a batch, got {batches} batches for {number()} "
            "processes: take more windows, or a smaller `calibration.batch_size`."
        )


def equal_batches(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Yields this process's part of ``items``, with whether each counts.

    All processes have the same number: where a last round has fewer than there are processes, the others are given one
    that counts elsewhere. Of [a, b, c] two processes have (a, True), (c, True), and (b, True), (c, False).
    """
    following = iter(items)
    while turn := list(islice(following, number())):
        yield (turn[rank()], True) if rank() < len(turn) else (turn[0], False)


def total(value: Tensor) -> Tensor:
    """Returns the sum of the processes' values, the same to the bit in all of them."""
    if number() == 1:
        return value
    place = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    summed = value.detach().to(place, copy=True)
    dist.all_reduce(summed)
    return summed.to(value.device)


def total_count(value: int) -> int:
    """Returns the sum of the processes' numbers."""
    return int(total(torch.tensor(value)))


def gathered(value: Any) -> list[Any]:
    """Returns the values of all processes, by rank."""
    if number() == 1:
        return [value]
    values: list[Any] = [None] * number()
    dist.all_gather_object(values, value)
    return values


def agree_on_threads() -> None:
    """Lets all processes compute with as many threads: with others a sum is another in the last bit.

    Lightning gives the processes that it starts fewer than they would take, under some strategies only the first.
    """
    if number() > 1:
        torch.set_num_threads(min(gathered(torch.get_num_threads())))


def check_same(what: str, value: Any) -> None:
    """Raises RuntimeError where ``value`` is not the same in all processes."""
    values = gathered(value)
    different = [index for index, other in enumerate(values) if other != values[0]]
    if different:
        raise RuntimeError(f"{what} must be the same in all processes, processes {different} differ from process 0")


def shards(trainer: Trainer) -> bool:
    """Returns whether the strategy of ``trainer`` shards weights."""
    return isinstance(trainer.strategy, ModelParallelStrategy)
