"""Collective operations between processes that hold the same model and divide the calibration windows among them.

In a single process they do nothing. The world size is that of torch.distributed.
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


def world_size() -> int:
    """Returns the number of processes."""
    is_distributed = dist.is_available() and dist.is_initialized() and not _single.get()
    return dist.get_world_size() if is_distributed else 1


def rank() -> int:
    """Returns the rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Returns whether this process prints and writes files; :func:`single_process` does not change the answer."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def single_process() -> Iterator[None]:
    """Makes this process behave as if it were the only one within the context, so that it waits for no other."""
    token = _single.set(True)
    try:
        yield
    finally:
        _single.reset(token)


def shard(items: Sequence[Item]) -> list[Item]:
    """Returns the items of this process: every n-th of ``items`` for n processes.

    Of [a, b, c] the first of two processes gets [a, c], the second [b].

    Raises:
        InputError: if there are fewer items than processes.
    """
    check_shards(len(items))
    return list(items[rank() :: world_size()])


def check_shards(batches: int) -> None:
    """Raises InputError if calibration has fewer batches than there are processes."""
    if batches < world_size():
        raise InputError(
            f"`calibration.num_samples` must give every process a batch, got {batches} batches for {world_size()} "
            "processes: take more windows, or a smaller `calibration.batch_size`."
        )


def equal_batches(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Yields the items of this process, the same number in all processes, each with whether its result counts.

    Sharded weights are gathered in every forward pass, in which all processes have to take part. A process for which no
    item is left in the last round repeats one that counts in another process: of [a, b, c] the first of two processes
    gets (a, True), (c, True) and the second (b, True), (c, False).
    """
    remaining = iter(items)
    while one_per_process := list(islice(remaining, world_size())):
        yield (one_per_process[rank()], True) if rank() < len(one_per_process) else (one_per_process[0], False)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Returns the sum of ``value`` over all processes, bit for bit the same in each of them."""
    if world_size() == 1:
        return value
    # nccl reduces GPU tensors only
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    summed = value.detach().to(device, copy=True)
    dist.all_reduce(summed)
    return summed.to(value.device)


def all_reduce_count(value: int) -> int:
    """Returns the sum of a count over all processes."""
    return int(all_reduce_sum(torch.tensor(value)))


def all_gather(value: Any) -> list[Any]:
    """Returns the values of all processes in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agree_on_threads() -> None:
    """Gives all processes the smallest number of threads of any; with different ones their sums differ in the last bit.

    Lightning limits the threads of the processes that it starts, but under some strategies only those of the first.
    """
    if world_size() > 1:
        torch.set_num_threads(min(all_gather(torch.get_num_threads())))


def check_same(what: str, value: Any) -> None:
    """Raises RuntimeError if ``value`` differs between processes; ``what`` names it."""
    values = all_gather(value)
    different = [index for index, other in enumerate(values) if other != values[0]]
    if different:
        raise RuntimeError(f"{what} must be the same in all processes, processes {different} differ from process 0")


def shards_weights(trainer: Trainer) -> bool:
    """Returns whether the strategy of ``trainer`` shards weights."""
    return isinstance(trainer.strategy, ModelParallelStrategy)
