"""Text as windows of tokens: documents are tokenised, joined into one stream and cut without overlap.

Sizes: N windows of T tokens.
"""

from __future__ import annotations

from typing import Any, final

import torch
from datasets import Dataset, Value
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.calibration.windows import begin_with
from lit_prune.data.base import DatasetKind, Part, Source, WindowSizes
from lit_prune.data.bos import Bos
from lit_prune.data.python_docs import SHARED_CHARACTERS
from lit_prune.errors import InputError
from lit_prune.progress import log


class PackedWindows(TorchDataset):
    """The non-overlapping windows of a token stream without its tail; item i is ``{"input_ids": (T,) int64}``.

    Args:
        stream: Token ids, shape (tokens,).
        seq_length: T, tokens per window.
        limit: Maximum number of windows; None uses all.
        bos: Id that is put before every window, whose last token is dropped; None leaves windows as they are.
    """

    def __init__(self, stream: Tensor, seq_length: int, limit: int | None = None, bos: int | None = None) -> None:
        count = stream.numel() // seq_length
        count = count if limit is None else min(count, limit)
        self.windows_NT, self.bos = stream[: count * seq_length].view(count, seq_length), bos

    def __len__(self) -> int:
        return len(self.windows_NT)

    @property
    def description(self) -> str:
        """The number and the length of the windows, as text."""
        return f"{len(self)} windows of {self.windows_NT.shape[1]} tokens"

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": begin_with(self.windows_NT[index][None].long(), self.bos)[0]}


@final
class TextData(DatasetKind):
    """The text of a source, packed into windows.

    Args:
        source: Where the text comes from.
        tokenizer: The tokenizer.
        sizes: The length and the number of windows.
        column: Column of the text, for sources whose rows have columns.
        separator: String that joins all rows before they are tokenised; None keeps them apart, each ended by the
            tokenizer's end-of-text token.
        bos: Whether windows begin with BOS.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        sizes: WindowSizes,
        *,
        column: str = "text",
        separator: str | None = None,
        bos: bool | None = None,
    ) -> None:
        self.source, self.tokenizer, self.sizes = source, tokenizer, sizes
        self.column, self.separator = column, separator
        self._bos = Bos.of(tokenizer, bos)
        self.bos = self._bos.window
        self.settings: dict[str, Any] = {"data.instructions": None, "data.bos": self.bos is not None}
        self._streams: dict[Part, Tensor] = {}

    def stream(self, part: Part) -> Tensor:
        """Returns all tokens of a part in order, shape (tokens,) int32; a part is read once."""
        if part not in self._streams:
            rows = self._rows(part)
            if part == "train" and self.source.may_overlap:
                rows = without_lines(rows, self._rows("val"))
            self._streams[part] = self._long_enough(part, self._tokenise(self._joined(rows)))
        return self._streams[part]

    def items(self, part: Part) -> PackedWindows:
        """Returns the windows of a part."""
        return PackedWindows(self.stream(part), self.sizes.tokens(part), self.sizes.count(part), self.bos)

    def describe(self, part: Part) -> str:
        """Returns the source of a part's text, with a note on BOS if the tokenizer adds it."""
        return self.source.describe(part) + self._bos.note

    def _rows(self, part: Part) -> Dataset:
        """The texts of a part: one per file, row of the data set, or document."""
        rows, where = self.source.rows(part), self.source.where(part)
        column = "text" if self.source.is_plain(part) else self.column
        rows = text_column(rows, column, where)
        if not any(text.strip() for text in rows["text"]):
            raise InputError(f"`data`: the {part} text must not be empty, {where} has none.")
        return rows if self.separator is not None else _without_empty(rows, where)

    def _joined(self, rows: Dataset) -> Dataset:
        """The documents to tokenise: every row, or all rows joined if there is a separator."""
        if self.separator is None or len(rows) == 1:
            return rows
        return Dataset.from_dict({"text": [self.separator.join(rows["text"])]})

    def _tokenise(self, documents: Dataset) -> Tensor:
        tokenizer, bos, end = self.tokenizer, self._bos, self.tokenizer.eos_token_id
        if len(documents) == 1 or end == bos.window:  # the BOS of the next document ends a document as well
            end = None

        def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            rows = [bos.begin(row) for row in tokenizer(batch["text"], verbose=False)["input_ids"]]
            if end is not None:
                rows = [row if row[-1:] == [end] else [*row, end] for row in rows]
            return {"input_ids": rows}

        rows = documents.map(tokens, batched=True, remove_columns=documents.column_names, desc="Tokenising")
        column = rows.with_format("arrow")[:]["input_ids"].combine_chunks()
        return torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy()).int()

    def _long_enough(self, part: Part, stream: Tensor) -> Tensor:
        field, tokens = "seq_length" if part == "train" else "val_seq_length", self.sizes.tokens(part)
        if stream.numel() < tokens:
            raise InputError(
                f"`data.{field}` must be at most the length of the text: the {part} text has {stream.numel()} "
                f"tokens, one window needs {tokens}. Give more text or a smaller `data.{field}`."
            )
        return stream


def text_column(rows: Dataset, column: str, where: str) -> Dataset:
    """Returns the texts of ``rows`` in one column, `text`; rows without text are left out, and their number is logged.

    Args:
        rows: Rows of a table.
        column: The column of the text.
        where: Name of the rows in error messages.

    Raises:
        InputError: if there is no such column, or it is not a column of text.
    """
    if column not in rows.column_names:
        raise InputError(
            f"`data.text_column` must be a column of {where}, got {column!r}; it has {', '.join(rows.column_names)}."
        )
    if column != "text":
        rows = rows.select_columns(column).rename_column(column, "text")
    rows = rows.select_columns("text")
    feature = rows.features["text"]
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "null"):
        kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__.lower()
        raise InputError(f"`data.text_column` must be a column of text, {column!r} of {where} holds {kind}.")
    if missing := rows.data.column("text").null_count:
        log(f"{missing} of {len(rows)} rows of {where} have no text and are left out.")
        rows = rows.filter(lambda row: row["text"] is not None)
    return rows


def _without_empty(rows: Dataset, where: str) -> Dataset:
    """Returns the rows that are not empty; the others would be documents of nothing but an end-of-text token."""
    if empty := sum(not text.strip() for text in rows["text"]):
        log(f"{empty} of {len(rows)} rows of {where} are empty and are left out.")
        rows = rows.filter(lambda row: row["text"].strip() != "")
    return rows


def without_lines(rows: Dataset, held_out: Dataset) -> Dataset:
    """Returns ``rows`` without their lines that are also in ``held_out``; short lines may be in both.

    Raises:
        InputError: if no line is left.
    """
    lines = {line.strip() for text in held_out["text"] for line in text.splitlines()}
    long_lines = {line for line in lines if len(line) >= SHARED_CHARACTERS}

    def unshared(row: dict[str, str]) -> dict[str, Any]:
        lines = row["text"].splitlines(keepends=True)
        unique = [line for line in lines if line.strip() not in long_lines]
        return {"text": "".join(unique), "dropped": len(lines) - len(unique)}

    cleaned = rows.map(unshared, desc="Comparing with validation")
    if dropped := sum(cleaned["dropped"]):
        log(f"{dropped} lines of training text are in the validation text too, and are left out.")
    remaining = cleaned.filter(lambda row: row["text"] or not row["dropped"]).remove_columns("dropped")
    if len(remaining) == 0:
        raise InputError("`data`: training and validation text must not be the same.")
    return remaining
