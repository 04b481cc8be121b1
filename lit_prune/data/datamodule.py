"""TextDataModule: text from the hub, from local files or from Python's own documentation, packed into windows.

documents -> tokens (through ``datasets`` and its cache) -> one stream -> non-overlapping windows, the tail dropped.
Calibration windows come from the training stream only. Sizes: N windows of T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lit_prune import distributed
from lit_prune.calibration.windows import Windows, draw_windows
from lit_prune.data.conversations import (
    Conversations,
    Example,
    Instructions,
    PackedConversations,
    examples,
    without,
)
from lit_prune.data.loaders import PaddedDataset, ResumableLoader, ShardedSampler
from lit_prune.data.python_docs import SHARED_CHARACTERS, python_docs
from lit_prune.distributed import shards
from lit_prune.errors import InputError, near_misses
from lit_prune.models.load import HUB_TIMEOUT_SECONDS, Tokenizer, load_tokenizer
from lit_prune.progress import log

BUILDERS = {".txt": "text", ".raw": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
Part = Literal["train", "val", "test"]
WINDOW_TOKENS = 1024
PYTHON_DOCS: dict[Part, str] = {
    "train": "training documents",
    "val": "validation documents",
    "test": "validation documents, as it has none to test on",
}
Files = str | list[str] | None


class PackedWindows(TorchDataset):
    """The non-overlapping windows of a token stream; item i is ``{"input_ids": (T,) int64}``.

    Args:
        stream: Token ids, shape (tokens,).
        seq_length: T, tokens per window.
        limit: Keep only the first so many windows.
    """

    def __init__(self, stream: torch.Tensor, seq_length: int, limit: int | None = None) -> None:
        count = stream.numel() // seq_length
        count = count if limit is None else min(count, limit)
        self.windows_NT = stream[: count * seq_length].view(count, seq_length)

    def __len__(self) -> int:
        return len(self.windows_NT)

    @property
    def told(self) -> str:
        """How many there are, and how long."""
        return f"{len(self)} windows of {self.windows_NT.shape[1]} tokens"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows_NT[index].long()}


class TextDataModule(LightningDataModule):
    """Text packed into windows of tokens for training, validation, test and calibration.

    Args:
        tokenizer: Hub id, folder, .gguf file or `embedded` whose tokenizer is used.
        source: `python-docs` (the documentation inside the running Python), or the id of a data set on the hub.
        name: Configuration of the hub data set, such as `wikitext-2-raw-v1`.
        train_split: Split of the hub data set that is trained and calibrated on.
        val_split: Split of the hub data set whose perplexity is reported.
        test_split: Split of the hub data set for `lit-prune test`.
        train_files: Local .txt, .jsonl or .parquet files; any local files replace `source` altogether.
        val_files: Local files for validation.
        test_files: Local files for `lit-prune test`.
        text_column: Column of the text in a hub data set, a .jsonl or a .parquet file.
        separator: String that joins the rows of a data set into one text before it is tokenised (the WikiText
            protocol); null keeps rows apart, each ended by the tokenizer's end-of-text token.
        packages: With `python-docs`, train on the docstrings of all installed packages too.
        instructions: Take the rows of files or of a hub data set for conversations, and train on their answers alone.
        seq_length: Tokens per training window; null takes 1024, on the command line the model's limit where that is
            less.
        val_seq_length: Tokens per window of validation and test; null takes `seq_length`.
        batch_size: Windows per batch.
        val_windows: Use only the first so many windows for validation and test; null uses all.
        seed: Seed of the order of the training windows.
        num_workers: Processes that load batches.

    Raises:
        InputError: for files that are missing or empty, a column that is not there, text shorter than one window,
            training and validation text that is the same.
    """

    def __init__(
        self,
        tokenizer: str = "embedded",
        source: str | None = "python-docs",
        name: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        train_files: Files = None,
        val_files: Files = None,
        test_files: Files = None,
        text_column: str = "text",
        separator: str | None = None,
        packages: bool = False,
        instructions: Instructions | None = None,
        seq_length: int | None = None,
        val_seq_length: int | None = None,
        batch_size: int = 8,
        val_windows: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        seq_length = WINDOW_TOKENS if seq_length is None else seq_length
        lengths = {"seq_length": seq_length, "val_seq_length": seq_length if val_seq_length is None else val_seq_length}
        for field, length in lengths.items():
            if length < 2:
                raise InputError(f"`data.{field}` must be at least 2, got {length}.")
        if batch_size < 1:
            raise InputError(f"`data.batch_size` must be at least 1, got {batch_size}.")
        if val_windows is not None and val_windows < 1:
            raise InputError(f"`data.val_windows` must be at least 1 or null, got {val_windows}.")
        self.tokenizer_name = tokenizer
        self.source, self.name, self.text_column, self.separator = source, name, text_column, separator
        self.splits: dict[Part, str] = {"train": train_split, "val": val_split, "test": test_split}
        self.files: dict[Part, list[str]] = {
            "train": _as_list(train_files),
            "val": _as_list(val_files),
            "test": _as_list(test_files),
        }
        self.packages, self.batch_size, self.instructions = packages, batch_size, instructions
        self.seq_length, self.val_seq_length = lengths["seq_length"], lengths["val_seq_length"]
        self.val_windows, self.seed, self.num_workers = val_windows, seed, num_workers
        self._streams: dict[Part, torch.Tensor] = {}
        self._examples: dict[Part, list[Example]] = {}
        self._tokenizer: Tokenizer | None = None
        self._check_files()
        self._check_instructions()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
            if self.instructions is not None:
                self.instructions.ready(self._tokenizer, self.tokenizer_name)
        return self._tokenizer

    def setup(self, stage: str) -> None:
        """Reads and tokenises what a stage needs: training and validation text for fit, else the part evaluated."""
        parts: dict[str, tuple[Part, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for part in parts[stage]:
            self.windows(part)
        if stage == "fit":
            self.train_dataloader()  # which says so now if there are too few

    def stream(self, part: Part) -> torch.Tensor:
        """Returns all tokens of a part in order, shape (tokens,) int32; a part's text is read once."""
        if part not in self._streams and self.instructions is not None:
            self._streams[part] = torch.tensor([i for row in self.examples(part) for i in row["input_ids"]]).int()
        if part not in self._streams:
            rows = self._rows(part)
            if part == "train":
                rows = self._without_validation(rows)
            stream = self._tokenise(self._joined(rows))
            field = "seq_length" if part == "train" else "val_seq_length"
            if stream.numel() < getattr(self, field):
                raise InputError(
                    f"`data.{field}` must be at most the length of the text: the {part} text has {stream.numel()} "
                    f"tokens, one window needs {getattr(self, field)}. Give more text or a smaller `data.{field}`."
                )
            self._streams[part] = stream
        return self._streams[part]

    def examples(self, part: Part) -> list[Example]:
        """Returns the conversations of a part as tokens and labels; they are read once."""
        if part not in self._examples:
            tokenizer, rows = self.tokenizer, self._rows(part)
            if part == "train" and (not self._local() or self.files["val"]):
                rows = without(rows, self._rows("val"))
            length = self.seq_length if part == "train" else self.val_seq_length
            self._examples[part] = examples(rows, tokenizer, length)
        return self._examples[part]

    def windows(self, part: Part) -> PackedWindows | Conversations | PackedConversations:
        """Returns the windows of a part, in order: of a conversation each where they are not packed."""
        train = part == "train"
        length, limit = (self.seq_length, None) if train else (self.val_seq_length, self.val_windows)
        if self.instructions is None:
            return PackedWindows(self.stream(part), length, limit)
        tokenizer = self.tokenizer
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        if self.instructions.packed:
            return PackedConversations(self.examples(part), length, pad, limit)
        return Conversations(self.examples(part), pad, limit)

    def calibration_windows(self, num_samples: int, seq_length: int, seed: int) -> Windows:
        """Returns windows drawn without replacement from the grid over the training stream; see ``draw_windows``."""
        return draw_windows(self.stream("train"), num_samples, seq_length, seed)

    def train_dataloader(self) -> DataLoader:
        """Returns shuffled training windows; their order is a function of the seed and the epoch."""
        items = self.windows("train")
        return ResumableLoader(
            items,
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=_collate(items),
        )

    def val_dataloader(self) -> DataLoader:
        """Returns the validation windows, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Returns the test windows, in order."""
        return self._loader("test")

    def describe(self, part: Part) -> str:
        """Returns where a part's text comes from, for protocols and reports."""
        return self._source(part) + ("" if self.instructions is None else ", answers alone")

    def _source(self, part: Part) -> str:
        if self._local():
            return " + ".join(Path(file).name for file in self.files[part])
        if self.source == "python-docs":
            return f"python-docs ({PYTHON_DOCS[part]})"
        return f"{self.source}{f' {self.name}' if self.name else ''}, split {self.splits[part]}"

    def resume_settings(self) -> dict[str, Any]:
        """Returns what the position in the data means nothing without, by field; a resumed run must have the same."""
        stream = self.stream("train")
        digest = hashlib.sha256(stream.numpy().tobytes()).hexdigest()[:12]
        text = f"text of {stream.numel():,} tokens, SHA-256 {digest}"
        return self.unread_settings() | {"data.train_files (or data.source)": text}

    def unread_settings(self) -> dict[str, Any]:
        """Returns those of :meth:`resume_settings` that are known before any text is read."""
        return {
            "data.instructions": None if self.instructions is None else repr(self.instructions),
            "data.seed": self.seed,
            "data.batch_size": self.batch_size,
            "data.seq_length": self.seq_length,
        }

    def _loader(self, part: Part) -> DataLoader:
        own = torch.Generator()  # evaluation draws nothing from the global random numbers, which training may use
        items = self.windows(part)
        if len(items) < distributed.number():
            raise InputError(
                f"`data.val_windows` must give each of {distributed.number()} processes a window, got {len(items)}."
            )
        in_step = self.trainer is not None and shards(self.trainer)
        shared, collate = PaddedDataset(items, distributed.number() if in_step else 1), _collate(items)
        return DataLoader(
            shared,
            self.batch_size,
            sampler=ShardedSampler(shared),
            num_workers=self.num_workers,
            generator=own,
            collate_fn=collate,
        )

    def _check_instructions(self) -> None:
        """Refuses what conversations have no use for."""
        if self.instructions is None:
            return
        if not self._local() and self.source == "python-docs":
            raise InputError(
                "`data.instructions` needs `data.train_files` and `data.val_files`, or a hub `data.source`."
            )
        others = {"text_column": self.text_column != "text", "separator": self.separator, "packages": self.packages}
        for field in (name for name, given in others.items() if given):
            raise InputError(f"`data.{field}` must be left out with `data.instructions`, which has columns of its own.")

    def _local(self) -> bool:
        return any(self.files.values())

    def _check_files(self) -> None:
        for part, files in self.files.items():
            for file in files:
                path = Path(file)
                if not path.is_file():
                    raise InputError(f"`data.{part}_files` must name files that are there, got {file}.")
                if path.stat().st_size == 0:
                    raise InputError(f"`data.{part}_files` must name files with text in them, {file} is empty.")
                if path.suffix not in BUILDERS:
                    raise InputError(f"`data.{part}_files` must end in {', '.join(BUILDERS)}, got {file}.")
        for part in ("val", "test"):
            shared = {Path(f).resolve() for f in self.files["train"]} & {Path(f).resolve() for f in self.files[part]}
            if shared:
                raise InputError(
                    f"`data.train_files` and `data.{part}_files` must not share text, both name {shared.pop()}."
                )
        if (
            not self._local()
            and self.source not in (None, "python-docs")
            and self.splits["train"] == self.splits["val"]
        ):
            raise InputError(f"`data.train_split` and `data.val_split` must differ, both are {self.splits['train']!r}.")

    def _rows(self, part: Part) -> Dataset:
        """Returns the text of a part as it comes: a row a file, a row of the data set, or a document."""
        if self._local():
            return self._from_files(part)
        if self.source == "python-docs":
            log(f"Reading Python's documentation, {'training' if part == 'train' else 'validation'} documents ...")
            rows = python_docs("train" if part == "train" else "validation", packages=self.packages)
            return Dataset.from_list(rows).select_columns("text")
        if self.source is None:
            raise InputError("`data.source` must be given, or `data.train_files` and `data.val_files`.")
        return self._one_column(self._from_hub(part), f"the data set {self.source}")

    def _from_files(self, part: Part) -> Dataset:
        if not self.files[part]:
            raise InputError(
                f"`data.{part}_files` must be given: local files replace `data.source`, and there are none for {part}."
            )
        builders = {BUILDERS[Path(file).suffix] for file in self.files[part]}
        if len(builders) > 1:
            raise InputError(f"`data.{part}_files` must all be of one kind, got {self.files[part]}.")
        builder = builders.pop()
        extra = {"sample_by": "document"} if builder == "text" else {}
        try:
            rows = load_dataset(builder, data_files=self.files[part], split="train", **extra)
        except Exception as error:  # each builder raises its own kinds for a file that it cannot read
            raise InputError(f"`data.{part}_files` cannot be read as {builder}: {_root_cause(error)}") from error
        return (
            rows
            if builder == "text" and self.instructions is None
            else self._one_column(rows, ", ".join(self.files[part]))
        )

    def _from_hub(self, part: Part) -> Dataset:
        assert self.source is not None
        if self.source.startswith((".", "/", "~")):
            raise InputError(
                f"`data.source` must be python-docs or a hub id; for {self.source} use `data.train_files`."
            )
        if "/" not in self.source and near_misses(self.source, ["python-docs"]):
            raise InputError(f"`data.source`: there is no data set {self.source!r}. Did you mean python-docs?")
        try:
            HfApi().dataset_info(self.source, timeout=HUB_TIMEOUT_SECONDS)
        except HfHubHTTPError:  # it answered; load_dataset says what
            pass
        except Exception:  # away, or offline on purpose: what is in the cache is to be had without five retries
            datasets.config.HF_HUB_OFFLINE = True
        try:
            return load_dataset(self.source, self.name, split=self.splits[part])
        except Exception as error:  # what datasets raises depends on the hub's answer and the data set's kind
            raise InputError(
                f"`data.source` {self.source!r} (name {self.name}, split {self.splits[part]}) cannot be loaded: "
                f"{_root_cause(error).rstrip('.')}. For local text use `data.train_files` and `data.val_files`."
            ) from error

    def _one_column(self, rows: Dataset, where: str) -> Dataset:
        if self.instructions is not None:
            return self.instructions.conversations(rows, where)
        if self.text_column not in rows.column_names:
            raise InputError(
                f"`data.text_column` must be a column of {where}, got {self.text_column!r}; it has "
                f"{', '.join(rows.column_names)}."
            )
        if self.text_column != "text":
            rows = rows.select_columns(self.text_column).rename_column(self.text_column, "text")
        rows = rows.select_columns("text")
        if rows.features["text"].dtype not in ("string", "large_string"):
            raise InputError(
                f"`data.text_column` must be a column of text, {self.text_column!r} of {where} holds "
                f"{rows.features['text'].dtype}."
            )
        if missing := rows.data.column("text").null_count:
            raise InputError(f"`data.text_column`: {missing} rows of {where} have no text; leave them out of the file.")
        return rows

    def _joined(self, rows: Dataset) -> Dataset:
        """Returns rows as the documents they are tokenised as: all joined where there is a `separator`."""
        if self.separator is None or len(rows) == 1:
            return rows
        return Dataset.from_dict({"text": [self.separator.join(rows["text"])]})

    def _without_validation(self, rows: Dataset) -> Dataset:
        """Drops the lines of training text, of some length, that stand in the validation part too."""
        if self._local() and not self.files["val"]:
            return rows
        if not self._local() and self.source == "python-docs":
            return rows  # its parts are disjoint by construction
        held_out = {line.strip() for text in self._rows("val")["text"] for line in text.splitlines()}
        held_out = {line for line in held_out if len(line) >= SHARED_CHARACTERS}

        def fresh(row: dict[str, str]) -> dict[str, Any]:
            lines = row["text"].splitlines(keepends=True)
            kept = [line for line in lines if line.strip() not in held_out]
            return {"text": "".join(kept), "dropped": len(lines) - len(kept)}

        cleaned = rows.map(fresh, desc="Comparing with validation")
        if dropped := sum(cleaned["dropped"]):
            log(f"{dropped} lines of training text stand in the validation text too, and are left out.")
        kept = cleaned.filter(lambda row: row["text"] or not row["dropped"]).remove_columns("dropped")
        if len(kept) == 0:
            raise InputError("`data`: training and validation text must not be the same.")
        return kept

    def _tokenise(self, documents: Dataset) -> torch.Tensor:
        tokenizer, end = self.tokenizer, self.tokenizer.eos_token_id
        several = len(documents) > 1

        def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            rows = tokenizer(batch["text"], verbose=False)["input_ids"]
            if several and end is not None:
                rows = [row if row[-1:] == [end] else [*row, end] for row in rows]
            return {"input_ids": rows}

        rows = documents.map(tokens, batched=True, remove_columns=documents.column_names, desc="Tokenising")
        column = rows.with_format("arrow")[:]["input_ids"].combine_chunks()
        return torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy()).int()


def _collate(items: TorchDataset) -> Callable[..., Any] | None:
    """What makes a batch of items that differ in length; None where a stack does."""
    return items.collate if isinstance(items, Conversations) else None


def _as_list(files: Files) -> list[str]:
    return [files] if isinstance(files, str) else list(files or [])


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
