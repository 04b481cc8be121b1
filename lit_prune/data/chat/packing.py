"""Data sets of tokenised conversations: one per item, padded to its batch, or packed into windows.

Sizes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lit_prune.evaluation.perplexity import IGNORED

Example = dict[str, list[int]]


class PaddedConversations(TorchDataset):
    """One conversation per item: ``{"input_ids": (T,), "labels": (T,)}``; :meth:`collate` pads a batch of them.

    Args:
        rows: Token ids and labels of the conversations.
        pad: Id of the padding token.
        limit: Maximum number of conversations; None uses all.
    """

    def __init__(self, rows: Sequence[Example], pad: int, limit: int | None = None) -> None:
        self.rows, self.pad = rows[:limit], pad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: torch.tensor(values) for key, values in self.rows[index].items()}

    @property
    def description(self) -> str:
        """The number and the length of the conversations, as text."""
        return f"{len(self)} conversations of up to {max(len(row['input_ids']) for row in self.rows)} tokens"

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns a batch, padded on the right, (B, T) each: `input_ids`, `attention_mask` and `labels`."""
        ids, labels = ([item[key] for item in items] for key in ("input_ids", "labels"))
        ones = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": _padded(ids, self.pad),
            "attention_mask": _padded(ones, 0),
            "labels": _padded(labels, IGNORED),
        }


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


class PackedConversations(TorchDataset):
    """Windows of packed whole conversations: ``{"input_ids": (T,), "labels": (T,), "position_ids": (T,)}``.

    Positions restart at 0 with each conversation, from which transformers derives an attention mask that keeps them
    apart; the rest of a window is padding, as a conversation of its own. A conversation that does not fit begins the
    next window.

    Args:
        rows: Token ids and labels of the conversations, none longer than a window.
        seq_length: T, tokens per window.
        pad: Id of the padding token.
        limit: Maximum number of windows; None uses all.
    """

    def __init__(self, rows: Sequence[Example], seq_length: int, pad: int, limit: int | None = None) -> None:
        windows: list[list[Example]] = []
        for row in rows:
            used = sum(len(other["input_ids"]) for other in windows[-1]) if windows else seq_length
            if used + len(row["input_ids"]) > seq_length:
                windows.append([])
            windows[-1].append(row)
        self.seq_length, self.pad, self.windows = seq_length, pad, windows[:limit]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index]
        unused = self.seq_length - sum(len(row["input_ids"]) for row in window)
        filled = [*window, {"input_ids": [self.pad] * unused, "labels": [IGNORED] * unused}]
        return {
            "input_ids": torch.tensor([i for row in filled for i in row["input_ids"]]),
            # the first token of a conversation would be predicted from the conversation before it
            "labels": torch.tensor([i for row in filled for i in [IGNORED, *row["labels"][1:]][: len(row["labels"])]]),
            "position_ids": torch.tensor([i for row in filled for i in range(len(row["input_ids"]))]),
        }

    @property
    def description(self) -> str:
        """The number and the length of the windows, as text."""
        return f"{len(self)} windows of {self.seq_length} tokens"
