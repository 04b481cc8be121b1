"""Sources of text and conversations: the hub, local files, and Python's own documentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import datasets
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from lit_prune.data.base import Part, Source
from lit_prune.data.files import FileList, root_cause
from lit_prune.data.python_docs import python_docs
from lit_prune.errors import InputError, near_misses
from lit_prune.files import cache_error
from lit_prune.models.load import HUB_TIMEOUT_SECONDS
from lit_prune.progress import log

PYTHON_DOCS: dict[Part, str] = {
    "train": "training documents",
    "val": "validation documents",
    "test": "validation documents, as it has none to test on",
}


@final
@dataclass(frozen=True)
class LocalFiles(Source):
    """Files on disk.

    Args:
        files: The files of every part.
        encoding: Encoding of text files; None is UTF-8.

    Raises:
        InputError: if two parts name the same file.
    """

    files: Mapping[Part, FileList]
    encoding: str | None = None

    def __post_init__(self) -> None:
        train = {path.resolve() for path in self.files["train"].paths}
        for part in ("val", "test"):
            if shared := train & {path.resolve() for path in self.files[part].paths}:
                raise InputError(
                    f"`data.train_files` and `data.{part}_files` must not share text, both name {shared.pop()}."
                )

    @property
    def may_overlap(self) -> bool:
        """Whether there are validation files."""
        return bool(self.files["val"].paths)

    def is_plain(self, part: Part) -> bool:
        """Returns whether the files are text files."""
        return self._given(part).builder == "text"

    def rows(self, part: Part) -> Dataset:
        """Returns the rows of the files of a part; a text file is one row."""
        return self._given(part).read(self.encoding)

    def describe(self, part: Part) -> str:
        """Returns the names of the files."""
        return " + ".join(self.files[part].names)

    def where(self, part: Part) -> str:
        """Returns the paths of the files."""
        return ", ".join(str(path) for path in self.files[part].paths)

    def _given(self, part: Part) -> FileList:
        if not self.files[part].paths:
            raise InputError(
                f"`data.{part}_files` must be given: local files replace `data.source`, and there are none for {part}."
            )
        return self.files[part]


@final
@dataclass(frozen=True)
class PythonDocs(Source):
    """The documentation of the running Python, whose training and validation parts are disjoint.

    Args:
        packages: Train on the docstrings of all installed packages too.
    """

    packages: bool = False

    @property
    def may_overlap(self) -> bool:
        """False."""
        return False

    def is_plain(self, part: Part) -> bool:
        """Returns True: a row is a document."""
        return True

    def rows(self, part: Part) -> Dataset:
        """Returns the documents of a part; the test part is the validation part."""
        log(f"Reading Python's documentation, {'training' if part == 'train' else 'validation'} documents ...")
        rows = python_docs("train" if part == "train" else "validation", packages=self.packages)
        return Dataset.from_list(rows).select_columns("text")

    def describe(self, part: Part) -> str:
        """Returns `python-docs` and the name of the part."""
        return f"python-docs ({PYTHON_DOCS[part]})"

    def where(self, part: Part) -> str:
        """Returns the description of the part."""
        return self.describe(part)


@final
@dataclass(frozen=True)
class HubDataset(Source):
    """A data set on the hub.

    Args:
        source: Its id. None raises only when rows are read, since some verbs read none.
        name: Its configuration.
        splits: The split for each part.

    Raises:
        InputError: if training and validation use the same split.
    """

    source: str | None
    name: str | None
    splits: Mapping[Part, str]

    def __post_init__(self) -> None:
        if self.source is not None and self.splits["train"] == self.splits["val"]:
            raise InputError(f"`data.train_split` and `data.val_split` must differ, both are {self.splits['train']!r}.")

    @property
    def may_overlap(self) -> bool:
        """True: the splits of a data set may repeat each other."""
        return True

    def is_plain(self, part: Part) -> bool:
        """Returns False: a row has columns."""
        return False

    def rows(self, part: Part) -> Dataset:
        """Returns the rows of the split of a part."""
        source = self._checked_source()
        self._ask_hub(source)
        try:
            return load_dataset(source, self.name, split=self.splits[part])
        except Exception as error:  # the exception depends on the hub's answer and on the data set's format
            unloadable = InputError(
                f"`data.source` {source!r} (name {self.name}, split {self.splits[part]}) cannot be loaded: "
                f"{root_cause(error).rstrip('.')}. For local text use `data.train_files` and `data.val_files`."
            )
            raise cache_error(error) or unloadable from error

    def describe(self, part: Part) -> str:
        """Returns the id, the configuration and the split."""
        return f"{self.source}{f' {self.name}' if self.name else ''}, split {self.splits[part]}"

    def where(self, part: Part) -> str:
        """Returns the id."""
        return f"the data set {self.source}"

    def _checked_source(self) -> str:
        """The id; raises InputError if it cannot be one."""
        source = self.source
        if source is None:
            raise InputError("`data.source` must be given, or `data.train_files` and `data.val_files`.")
        if source.startswith((".", "/", "~")):
            raise InputError(f"`data.source` must be python-docs or a hub id; for {source} use `data.train_files`.")
        if "/" not in source and near_misses(source, ["python-docs"]):
            raise InputError(f"`data.source`: there is no data set {source!r}. Did you mean python-docs?")
        return source

    @staticmethod
    def _ask_hub(source: str) -> None:
        """Switches ``datasets`` to its cache if the hub does not answer, to spare its five slow retries."""
        try:
            HfApi().dataset_info(source, timeout=HUB_TIMEOUT_SECONDS)
        except HfHubHTTPError:  # the hub answered; load_dataset reports its error
            pass
        except Exception:  # no connection, or offline on purpose
            datasets.config.HF_HUB_OFFLINE = True
