"""The two interfaces of training data: a source provides rows, a dataset kind turns them into training items."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from datasets import Dataset
from torch import Tensor

from lit_prune.calibration.windows import Windows, draw_windows

Part = Literal["train", "val", "test"]


class Source(ABC):
    """A source of rows for the three parts of the data: training, validation and test."""

    @property
    @abstractmethod
    def may_overlap(self) -> bool:
        """Whether training rows may repeat validation rows, so that the two have to be compared."""

    @abstractmethod
    def is_plain(self, part: Part) -> bool:
        """Returns whether a row of a part is a whole text in a column `text`, not a row of a table."""

    @abstractmethod
    def rows(self, part: Part) -> Dataset:
        """Returns the rows of a part, with all their columns.

        Raises:
            InputError: if there are none, or they cannot be read.
        """

    @abstractmethod
    def describe(self, part: Part) -> str:
        """Returns the name of a part's rows in reports."""

    @abstractmethod
    def where(self, part: Part) -> str:
        """Returns the name of a part's rows in error messages."""


@dataclass(frozen=True)
class WindowSizes:
    """The length and the number of windows.

    Attributes:
        train: Tokens of a training window.
        val: Tokens of a validation or test window.
        limit: Maximum number of validation or test windows; None uses all.
    """

    train: int
    val: int
    limit: int | None = None

    def tokens(self, part: Part) -> int:
        """Returns the number of tokens in a window of ``part``."""
        return self.train if part == "train" else self.val

    def count(self, part: Part) -> int | None:
        """Returns the maximum number of windows of ``part``; None means all."""
        return None if part == "train" else self.limit


class Items(Protocol):
    """A map-style data set of dicts of tensors, with a short description of itself."""

    @property
    def description(self) -> str:
        """The number and the length of the items, as text."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class DatasetKind(ABC):
    """A kind of training data, such as text or conversations, built from the rows of a source; each part is read once.

    Attributes:
        bos: Id of the token that every window begins with; None adds no token.
        settings: The settings, by field, that a resumed run must share with the original run.
    """

    bos: int | None
    settings: dict[str, Any]

    @abstractmethod
    def stream(self, part: Part) -> Tensor:
        """Returns all tokens of a part in order, shape (tokens,) int32."""

    @abstractmethod
    def items(self, part: Part) -> Items:
        """Returns the windows of a part, in order, for a loader to batch."""

    @abstractmethod
    def describe(self, part: Part) -> str:
        """Returns a description of a part, for protocols and reports."""

    def calibration_windows(self, num_samples: int, seq_length: int, seed: int) -> Windows:
        """Returns windows drawn without replacement from the grid over the training stream; see ``draw_windows``."""
        return draw_windows(self.stream("train"), num_samples, seq_length, seed, bos=self.bos)


def concatenated(rows: list[list[int]]) -> Tensor:
    """Returns the tokens of all rows, one after the other, shape (tokens,) int32."""
    return torch.tensor([token for row in rows for token in row], dtype=torch.int32)
