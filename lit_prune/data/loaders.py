"""DataLoaders for one process or several: one whose order is a function of (seed, epoch), and that a checkpoint can put
back where it was, and one that gives every window once.

In several processes a step of the training reads the windows that one process reads in a batch so many times as large.
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

EPOCH_STRIDE = 1_000_003  # so that neighbouring seeds share no epoch's order


class EpochOrder(DistributedSampler[int]):  # by this type Lightning knows that it need not share out the items itself
    """The order of this process's items in an epoch, from a position on.

    All processes have the same number, those that are left over in no epoch.

    Args:
        items: The data set.
        seed: Seed of the order.

    Raises:
        InputError: if there are fewer items than processes, and so none in any epoch.
    """

    def __init__(self, items: Dataset, seed: int) -> None:
        super().__init__(items, distributed.number(), distributed.rank(), seed=seed)
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
        torch.empty((), dtype=torch.int64).random_(generator=random)  # as a plain, shuffled DataLoader does first
        return torch.randperm(self.count, generator=random)

    def __iter__(self) -> Iterator[int]:
        shared = self.order()[: len(self) * self.num_replicas]
        return iter(shared[self.rank :: self.num_replicas][self.begin :].tolist())

    def __len__(self) -> int:
        return self.count // self.num_replicas


class ResumableLoader(DataLoader):
    """Shuffled batches; what was read of an epoch is skipped after a resume, and not read.

    Lightning keeps its state in every checkpoint. It draws nothing from the global random numbers.

    Args:
        items: A map-style data set.
        batch_size: Items per batch.
        seed: Seed of the order.
        num_workers: Processes that load batches.
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
        own = torch.Generator().manual_seed(seed)
        super().__init__(
            items, batch_size, sampler=self.ordered, num_workers=num_workers, generator=own, collate_fn=collate_fn
        )
        self.position = {"epoch": 0, "batches": 0}
        self._resumed = False

    def __iter__(self) -> Any:
        """Yields the batches of the epoch; it begins at the position of a checkpoint that was just loaded."""
        epoch = self.ordered.epoch  # by the time of the first batch Lightning has set it
        skipped = self.position["batches"] if self._resumed and self.position["epoch"] == epoch else 0
        self._resumed = False
        self.ordered.begin = skipped * (self.batch_size or 1)
        self.position = {"epoch": epoch, "batches": skipped}
        for batch in super().__iter__():
            self.position["batches"] += 1
            yield batch

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it the loader may be read for another purpose than training, which goes on where it was."""
        kept = self.position, self._resumed, self.ordered.epoch, self.ordered.begin
        try:
            self._resumed = False
            yield
        finally:
            self.position, self._resumed, self.ordered.epoch, self.ordered.begin = kept

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch, and how many of its batches were given."""
        return dict(self.position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the position of a checkpoint."""
        self.position, self._resumed = dict(state_dict), True


class PaddedDataset(Dataset):
    """The items of a data set, and as many more as make their number a multiple; those that are added predict nothing.

    So all processes make as many forward passes, which sharded weights ask for. Where none has to be added, the items
    are as they are; else they have `labels`, -100 in those that are added.

    Args:
        items: Gives dicts of `input_ids` (T,) and perhaps `labels`.
        multiple: How many processes there are.
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
    """Every item once, in order: to each process every so-manieth; no item twice, as Lightning's own would have it.

    Args:
        items: The data set.
    """

    def __init__(self, items: Dataset) -> None:
        super().__init__(items, distributed.number(), distributed.rank(), shuffle=False)
        self.indices = range(self.rank, len(items), self.num_replicas)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
