"""Calibration windows: their number and length, their positions in the text, and their batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_prune.errors import InputError

CALIBRATION_TOKENS = 2048
Batch = dict[str, Tensor]
INPUT_NAMES = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Calibration:
    """The sample of text that statistics are computed over.

    Args:
        num_samples: Number of windows.
        seq_length: Tokens per window; null is 2048, or on the command line the model's limit if that is less.
        seed: Seed for drawing windows.
        batch_size: Windows per forward pass.

    Raises:
        InputError: for a number below 1 (`seq_length`: below 2).
    """

    num_samples: int = 128
    seq_length: int | None = None
    seed: int = 0
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, least in {"num_samples": 1, "seq_length": 2, "batch_size": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"`calibration.{name}` must be at least {least}, got {value}.")

    @property
    def tokens(self) -> int:
        """Tokens per window."""
        return CALIBRATION_TOKENS if self.seq_length is None else self.seq_length

    @property
    def batches(self) -> int:
        """Number of batches, of which the last may be smaller."""
        return -(-self.num_samples // self.batch_size)


class Windows(NamedTuple):
    """Calibration windows, (N, T), and the position in the token stream at which each begins."""

    input_ids_NT: Tensor
    positions: list[int]


def draw_windows(stream: Tensor, num_samples: int, seq_length: int, seed: int, *, bos: int | None = None) -> Windows:
    """Returns windows drawn without replacement from the grid of non-overlapping windows over a token stream.

    Ten tokens and a `seq_length` of 3 make a grid of three windows, at 0, 3 and 6.

    Args:
        stream: Token ids, shape (tokens,).
        num_samples: N, number of windows.
        seq_length: T, tokens per window.
        seed: Seed for drawing windows.
        bos: Id that every window begins with, see :func:`begin_with`.

    Raises:
        InputError: if there are fewer than ``num_samples`` windows.
    """
    available = stream.numel() // seq_length
    if num_samples > available:
        raise InputError(
            f"`calibration.num_samples` must be at most {available}, the number of windows of {seq_length} tokens in "
            f"the training text ({stream.numel()} tokens), got {num_samples}."
        )
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
    grid_NT = stream[: available * seq_length].view(available, seq_length)
    return Windows(begin_with(grid_NT[drawn].long(), bos), [int(index) * seq_length for index in drawn])


def begin_with(windows_NT: Tensor, bos: int | None) -> Tensor:
    """Returns windows with ``bos`` in front and without their last token; those that begin with it are unchanged.

    With BOS 1, [5, 6, 7] becomes [1, 5, 6], and [1, 5, 6] stays the same.

    Args:
        windows_NT: Token ids, (N, T).
        bos: The id; None returns the windows as they are.
    """
    if bos is None:
        return windows_NT
    shifted_NT = torch.cat([torch.full_like(windows_NT[:, :1], bos), windows_NT[:, :-1]], 1)
    return torch.where(windows_NT[:, :1] == bos, windows_NT, shifted_NT)


def batches_of(windows: Windows, batch_size: int) -> list[Batch]:
    """Returns ``windows`` as batches of at most ``batch_size``."""
    return [{"input_ids": part} for part in windows.input_ids_NT.split(batch_size)]


def first_batches(loader: Iterable[Any], calibration: Calibration) -> list[Batch]:
    """Returns the first ``num_samples`` rows of a dataloader in its own batches, cut to ``seq_length`` tokens.

    Args:
        loader: An iterable of mappings with `input_ids` (batch, tokens) and, where there is padding, `attention_mask`.
        calibration: The number of rows and of tokens.

    Raises:
        InputError: if a batch is not such a mapping, or there are too few rows.
    """
    batches, rows = [], 0
    for batch in loader:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise InputError(
                "`calibration`: batches of the training dataloader must be dicts with a tensor `input_ids`, got "
                f"{type(batch).__name__}."
            )
        wanted = (slice(calibration.num_samples - rows), slice(calibration.tokens))
        batches.append({key: batch[key][wanted] for key in ("input_ids", "attention_mask") if key in batch})
        rows += len(batches[-1]["input_ids"])
        if rows == calibration.num_samples:
            return batches
    raise InputError(
        f"`calibration.num_samples` must be at most {rows}, the rows that the training dataloader gives, got "
        f"{calibration.num_samples}."
    )


def inputs_of(batch: Mapping[str, Tensor]) -> Batch:
    """Returns the tensors of ``batch`` that a model takes: ids, and attention mask and positions if present."""
    return {name: batch[name] for name in INPUT_NAMES if batch.get(name) is not None}
