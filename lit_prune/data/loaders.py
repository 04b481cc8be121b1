"""A resumable training DataLoader, and the padding and sharding of evaluation data.

The order of training windows is a function of (seed, epoch). A step of n processes reads the same windows as a single
process does with a batch n times as large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_prune import distributed
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import IGNORED

EPOCH_STRIDE = 1_000_003  # so that no epoch of a seed has the order of another epoch of the next seed


class EpochOrder(DistributedSampler[int]):  # Lightning replaces any other sampler by its own
    """The order of this process's items in an epoch, starting at a position.

    All processes have the same number of items; the remainder of an epoch is dropped.

    Args:
        items: The data set.
        seed: Seed of the order.

    Raises:
        InputError: if there are fewer items than processes.
    """

    def __init__(self, items: Dataset, seed: int) -> None:
        super().__init__(items, distributed.world_size(), distributed.rank(), seed=seed)
        self.count, self.begin = len(items), 0  # type: ignore[arg-type]
        if self.count < self.num_replicas:
            raise InputError(
                f"`data`: the training text must have a window for every process, got {self.count} for "
                f"{self.num_replicas} processes: give more text, a smaller `data.seq_length`, or fewer "
                "`trainer.devices`."
            )

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; Lightning calls it before each."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """Returns the indices of the items in the order of this epoch, shape (count,)."""
        random = torch.Generator().manual_seed(self.seed + EPOCH_STRIDE * self.epoch)
        # a plain DataLoader first draws the seed of its workers; doing the same gives epoch 0 its shuffled order
        torch.empty((), dtype=torch.int64).random_(generator=random)
        return torch.randperm(self.count, generator=random)

    def __iter__(self) -> Iterator[int]:
        shared = self.order()[: len(self) * self.num_replicas]
        return iter(shared[self.rank :: self.num_replicas][self.begin :].tolist())

    def __len__(self) -> int:
        return self.count // self.num_replicas


class ResumableLoader(DataLoader):
    """A loader of shuffled batches; a resumed run skips the batches of the epoch that were read, without loading them.

    Lightning stores its state in every checkpoint. It does not use the global random number generator.

    Args:
        items: A map-style data set.
        batch_size: Items per batch.
        seed: Seed of the order.
        num_workers: Number of worker processes that load batches.
        collate_fn: Makes a batch of a list of items; None stacks them.
    """

    def __init__(
        self,
        items: Dataset,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        collate_fn: Callable[..., Any] | None = None,
    ) -> None:
        self.ordered = EpochOrder(items, seed)
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            items, batch_size, sampler=self.ordered, num_workers=num_workers, generator=generator, collate_fn=collate_fn
        )
        self.position = {"epoch": 0, "batches": 0}
        self._resumed = False

    def __iter__(self) -> Any:
        """Yields the batches of the epoch, starting at the position of a checkpoint if one was just loaded."""
        epoch = self.ordered.epoch  # Lightning calls set_epoch after making the loader and before the first batch
        skipped = self.position["batches"] if self._resumed and self.position["epoch"] == epoch else 0
        self._resumed = False
        self.ordered.begin = skipped * (self.batch_size or 1)
        self.position = {"epoch": epoch, "batches": skipped}
        for batch in super().__iter__():
            self.position["batches"] += 1
            yield batch

    @contextmanager
    def position_preserved(self) -> Iterator[None]:
        """Restores the position when the context ends, so that the loader can be read without advancing training."""
        before = self.position, self._resumed, self.ordered.epoch, self.ordered.begin
        try:
            self._resumed = False
            yield
        finally:
            self.position, self._resumed, self.ordered.epoch, self.ordered.begin = before

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch and the number of batches of it that were read."""
        return dict(self.position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position of a checkpoint."""
        self.position, self._resumed = dict(state_dict), True


class PaddedDataset(Dataset):
    """A data set padded to a multiple of the number of processes with items that predict nothing.

    Sharded weights need the same number of forward passes in all processes. If nothing has to be added, items are
    returned unchanged; else all have `labels`, which are -100 in the added items.

    Args:
        items: A data set of dicts with `input_ids` (T,) and perhaps `labels`.
        multiple: Number of processes.
    """

    def __init__(self, items: Dataset, multiple: int) -> None:
        self.items, self.count = items, len(items)  # type: ignore[arg-type]
        self.added = -self.count % multiple

    def __len__(self) -> int:
        return self.count + self.added

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index % self.count]
        if not self.added:
            return item
        labels = item.get("labels", item["input_ids"])
        return item | {"labels": labels if index < self.count else torch.full_like(labels, IGNORED)}


class ShardedSampler(DistributedSampler[int]):
    """A sampler that gives each of n processes every n-th item, in order, so that every item is read exactly once.

    Lightning's own sampler repeats items to give all processes the same number, and a perplexity would count those
    twice.

    Args:
        items: The data set.
    """

    def __init__(self, items: Dataset) -> None:
        super().__init__(items, distributed.world_size(), distributed.rank(), shuffle=False)
        self.indices = range(self.rank, len(items), self.num_replicas)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
