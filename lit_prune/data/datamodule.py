"""TextDataModule: batches of text or conversations from the hub, from local files or from Python's documentation.

This file has the fields that a user sets and Lightning's loaders; sources and kinds of data have files of their own.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig

from lit_prune import distributed
from lit_prune.calibration.windows import Windows
from lit_prune.data.base import DatasetKind, Items, Part, Source, WindowSizes
from lit_prune.data.chat.conversations import ConversationData, Instructions
from lit_prune.data.chat.template import set_chat_template
from lit_prune.data.files import FileList, check_encoding_name
from lit_prune.data.loaders import PaddedDataset, ResumableLoader, ShardedSampler
from lit_prune.data.sources import HubDataset, LocalFiles, PythonDocs
from lit_prune.data.text import TextData
from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.models.load import Tokenizer, load_tokenizer

WINDOW_TOKENS = 1024
Names = str | list[str] | None


class TextDataModule(LightningDataModule):
    """Text or conversations in windows of tokens, for training, validation, test and calibration.

    Args:
        tokenizer: The model whose tokenizer is used: a hub id, a folder, a .gguf file, or `embedded`.
        source: `python-docs` (the documentation inside the running Python), or the id of a data set on the hub.
        name: Configuration of the hub data set, such as `wikitext-2-raw-v1`.
        train_split: Split of the hub data set that is trained and calibrated on.
        val_split: Split of the hub data set whose perplexity is reported.
        test_split: Split of the hub data set for `lit-prune test`.
        train_files: Local .txt, .csv, .jsonl or .parquet files, folders of them or patterns; if any local files are
            given, `source` is not used.
        val_files: Local files for validation.
        test_files: Local files for `lit-prune test`.
        encoding: Encoding of local files, such as `latin-1` or `utf-16`; null is UTF-8.
        text_column: Column of the text in a hub data set or in a .csv, .jsonl or .parquet file.
        separator: String that joins the rows of a data set into one text before it is tokenised (the WikiText
            protocol); null keeps rows apart, each ended by the tokenizer's end-of-text token.
        packages: With `python-docs`, train on the docstrings of all installed packages too.
        instructions: Read the rows of files or of a hub data set as conversations, and train only on their answers.
        bos: Begin every window with the tokenizer's BOS token and drop its last token; null does so if the tokenizer
            itself adds BOS to a text, false leaves windows as they are cut (the papers' protocol).
        seq_length: Tokens per training window; null is 1024, or on the command line the model's limit if that is less.
        val_seq_length: Tokens per validation and test window; null is `seq_length`.
        batch_size: Windows per batch.
        val_windows: Number of windows, from the first on, that validation and test use; null uses all.
        seed: Seed of the order of the training windows.
        num_workers: Number of worker processes that load batches.
        trust_remote_code: Run Python code that comes with the tokenizer.

    Raises:
        InputError: for files that are missing or empty, a column that does not exist, text shorter than one window, or
            validation text that equals the training text.
    """

    def __init__(
        self,
        tokenizer: str = "embedded",
        source: str | None = "python-docs",
        name: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        train_files: Names = None,
        val_files: Names = None,
        test_files: Names = None,
        encoding: str | None = None,
        text_column: str = "text",
        separator: str | None = None,
        packages: bool = False,
        instructions: Instructions | None = None,
        bos: bool | None = None,
        seq_length: int | None = None,
        val_seq_length: int | None = None,
        batch_size: int = 8,
        val_windows: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.seq_length = WINDOW_TOKENS if seq_length is None else seq_length
        self.val_seq_length = self.seq_length if val_seq_length is None else val_seq_length
        self.batch_size, self.val_windows, self.seed, self.num_workers = batch_size, val_windows, seed, num_workers
        self.tokenizer_name, self.trust_remote_code = tokenizer, trust_remote_code
        self.instructions, self.bos = instructions, bos
        self.text_column, self.separator, self.packages = text_column, separator, packages
        self._vocabulary: int | None = None
        self._check_sizes()
        check_encoding_name(encoding)
        named: dict[Part, Names] = {"train": train_files, "val": val_files, "test": test_files}
        splits: dict[Part, str] = {"train": train_split, "val": val_split, "test": test_split}
        self.source = _source(source, name, splits, named, packages, encoding)
        self._check_instructions()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with the chat template of conversations, loaded on first use."""
        tokenizer = load_tokenizer(self.tokenizer_name, self.trust_remote_code)
        if self.instructions is not None:
            set_chat_template(tokenizer, self.instructions.chat_template, self.tokenizer_name)
        return tokenizer

    @cached_property
    def kind(self) -> DatasetKind:
        """Windows of text or of conversations; their data is read on first use."""
        sizes = WindowSizes(self.seq_length, self.val_seq_length, self.val_windows)
        if self.instructions is not None:
            return ConversationData(self.source, self.tokenizer, sizes, instructions=self.instructions, bos=self.bos)
        return TextData(
            self.source, self.tokenizer, sizes, column=self.text_column, separator=self.separator, bos=self.bos
        )

    def setup(self, stage: str) -> None:
        """Reads and tokenises the data of a stage: training and validation data for fit, else that of the stage."""
        parts: dict[str, tuple[Part, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        config = getattr(getattr(self.trainer, "lightning_module", None), "config", None)
        if self._vocabulary is None and isinstance(config, PreTrainedConfig):
            self.check_vocabulary(config)
        for part in parts[stage]:
            self.windows(part)
        if stage == "fit":
            self.train_dataloader()  # raises here, before training, if there are fewer windows than processes

    def check_vocabulary(self, config: PreTrainedConfig) -> None:
        """Checks that the model has an embedding for every token of the tokenizer, and later of the text.

        Added tokens may lack an embedding as long as no text uses them, as Gemma 3's image tokens do.

        Raises:
            InputError: if the tokenizer has more tokens, without added ones, than the model of ``config``.
        """
        self._vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        self._check_ids(self.tokenizer.vocab_size - 1)

    def stream(self, part: Part) -> Tensor:
        """Returns all tokens of a part in order, shape (tokens,) int32; a part's text is read once."""
        stream = self.kind.stream(part)
        self._check_ids(int(stream.max()))
        return stream

    def windows(self, part: Part) -> Items:
        """Returns the windows of a part, in order; unpacked conversations are a window each."""
        self.stream(part)
        return self.kind.items(part)

    def calibration_windows(self, num_samples: int, seq_length: int, seed: int) -> Windows:
        """Returns windows drawn without replacement from the grid over the training stream; see ``draw_windows``."""
        self.stream("train")
        return self.kind.calibration_windows(num_samples, seq_length, seed)

    def train_dataloader(self) -> DataLoader:
        """Returns a loader of the training windows in an order that is a function of the seed and the epoch."""
        items = self.windows("train")
        return ResumableLoader(
            items,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=getattr(items, "collate", None),
        )

    def val_dataloader(self) -> DataLoader:
        """Returns a loader of the validation windows, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Returns a loader of the test windows, in order."""
        return self._loader("test")

    def describe(self, part: Part) -> str:
        """Returns a description of a part's data, for protocols and reports."""
        return self.kind.describe(part)

    def resume_settings(self) -> dict[str, Any]:
        """Returns the settings that define the order of the training windows; a resumed run must have the same."""
        stream = self.stream("train")
        digest = hashlib.sha256(stream.numpy().tobytes()).hexdigest()[:12]
        text = f"text of {stream.numel():,} tokens, SHA-256 {digest}"
        return self.expected_settings() | {"data.train_files (or data.source)": text}

    def expected_settings(self) -> dict[str, Any]:
        """Returns the part of :meth:`resume_settings` that is known before any text is read."""
        sizes = {"data.seed": self.seed, "data.batch_size": self.batch_size, "data.seq_length": self.seq_length}
        return self.kind.settings | sizes

    def _loader(self, part: Part) -> DataLoader:
        items = self.windows(part)
        if len(items) < distributed.world_size():
            raise InputError(
                f"`data.val_windows` must give each of {distributed.world_size()} processes a window, got {len(items)}."
            )
        # sharded weights are gathered in every forward pass, so all processes must make the same number of passes
        multiple = distributed.world_size() if self.trainer is not None and shards_weights(self.trainer) else 1
        padded = PaddedDataset(items, multiple)  # type: ignore[arg-type]
        return DataLoader(
            padded,
            self.batch_size,
            sampler=ShardedSampler(padded),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # drawing from the global one would change training
            collate_fn=getattr(items, "collate", None),
        )

    def _check_sizes(self) -> None:
        for field in ("seq_length", "val_seq_length"):
            if getattr(self, field) < 2:
                raise InputError(f"`data.{field}` must be at least 2, got {getattr(self, field)}.")
        if self.batch_size < 1:
            raise InputError(f"`data.batch_size` must be at least 1, got {self.batch_size}.")
        if self.val_windows is not None and self.val_windows < 1:
            raise InputError(f"`data.val_windows` must be at least 1 or null, got {self.val_windows}.")

    def _check_instructions(self) -> None:
        """Raises InputError for fields that have no effect on conversations."""
        if self.instructions is None:
            return
        if isinstance(self.source, PythonDocs):
            raise InputError(
                "`data.instructions` needs `data.train_files` and `data.val_files`, or a hub `data.source`."
            )
        others = {"text_column": self.text_column != "text", "separator": self.separator, "packages": self.packages}
        for field in (name for name, given in others.items() if given):
            raise InputError(f"`data.{field}` must be left out with `data.instructions`, which has columns of its own.")

    def _check_ids(self, largest: int) -> None:
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise InputError(
                f"`data.tokenizer` must be that of the model, which has embeddings of {self._vocabulary} tokens, "
                f"{self.tokenizer_name} gives token {largest}."
            )


def _source(
    source: str | None,
    name: str | None,
    splits: dict[Part, str],
    named: dict[Part, Names],
    packages: bool,
    encoding: str | None,
) -> Source:
    """The source that the fields describe; local files take precedence."""
    files = {part: [given] if isinstance(given, str) else list(given or []) for part, given in named.items()}
    if any(files.values()):
        return LocalFiles({part: FileList.find(f"data.{part}_files", names) for part, names in files.items()}, encoding)
    return PythonDocs(packages) if source == "python-docs" else HubDataset(source, name, splits)
