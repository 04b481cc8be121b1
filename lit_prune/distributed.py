"""Sums and agreement between processes that have the same model and share the calibration windows.

In a single process all of it does nothing. The number of processes is that of torch.distributed.
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
_single: ContextVar[bool] = ContextVar("single", default=False)


def number() -> int:
    """Returns the number of processes."""
    several = dist.is_available() and dist.is_initialized() and not _single.get()
    return dist.get_world_size() if several else 1


def rank() -> int:
    """Returns the number of this process, from 0."""
    return dist.get_rank() if number() > 1 else 0


def first() -> bool:
    """Returns whether this process is the one that prints and writes, also within :func:`single_process`."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def single_process() -> Iterator[None]:
    """Lets this process work by itself for as long as the context lasts, without waiting for the others."""
    token = _single.set(True)
    try:
        yield
    finally:
        _single.reset(token)


def share(items: Sequence[Item]) -> list[Item]:
    """Returns every n-th of ``items`` for n processes: of [a, b, c] the first of two gets [a, c], the second [b].

    Raises:
        InputError: if there are fewer items than processes.
    """
    check_shares(len(items))
    return list(items[rank() :: number()])


def check_shares(batches: int) -> None:
    """Raises InputError if calibration has fewer batches than there are processes."""
    if batches < number():
        raise InputError(
            f"`calibration.num_samples` must give every process a batch, got {batches} batches for {number()} "
            "processes: take more windows, or a smaller `calibration.batch_size`."
        )


def equal_batches(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Yields every n-th of ``items`` for n processes, each with whether it counts; all processes get the same number.

    Sharded weights are gathered in every forward pass, for which all processes have to make one. A process for which
    the last round has no item left gets one that counts in another: of [a, b, c] two processes get (a, True), (c, True)
    and (b, True), (c, False).
    """
    following = iter(items)
    while one_each := list(islice(following, number())):
        yield (one_each[rank()], True) if rank() < len(one_each) else (one_each[0], False)


def total(value: Tensor) -> Tensor:
    """Returns the sum of the processes' values, the same to the bit in all of them."""
    if number() == 1:
        return value
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")  # nccl sums on GPUs alone
    summed = value.detach().to(device, copy=True)
    dist.all_reduce(summed)
    return summed.to(value.device)


def total_count(value: int) -> int:
    """Returns the sum of the processes' counts."""
    return int(total(torch.tensor(value)))


def gathered(value: Any) -> list[Any]:
    """Returns the values of all processes, by rank."""
    if number() == 1:
        return [value]
    values: list[Any] = [None] * number()
    dist.all_gather_object(values, value)
    return values


def agree_on_threads() -> None:
    """Gives all processes the same number of threads, without which their sums would differ in the last bit.

    Lightning limits the threads of the processes that it starts, under some strategies only of the first.
    """
    if number() > 1:
        torch.set_num_threads(min(gathered(torch.get_num_threads())))


def check_same(what: str, value: Any) -> None:
    """Raises RuntimeError if ``value`` differs between processes; ``what`` names it."""
    values = gathered(value)
    different = [index for index, other in enumerate(values) if other != values[0]]
    if different:
        raise RuntimeError(f"{what} must be the same in all processes, processes {different} differ from process 0")


def shards(trainer: Trainer) -> bool:
    """Returns whether the strategy of ``trainer`` shards weights."""
    return isinstance(trainer.strategy, ModelParallelStrategy)
