"""Local files of text or rows: listed from names, folders and patterns, and read in their encoding."""

from __future__ import annotations

import codecs
import glob
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, load_dataset

from lit_prune.errors import InputError
from lit_prune.files import cache_error

BUILDERS = {
    ".txt": "text",
    ".raw": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst")
NO_ROWS = ("corresponds to no data", "Please pass `features`")  # from the errors of ``datasets`` for files without rows
UTF_8 = "utf-8-sig"  # utf-8 that skips a byte-order mark


@dataclass(frozen=True)
class FileList:
    """The files that a field of the data module names.

    Attributes:
        field: The field, such as `data.train_files`.
        paths: The files.
        names: Names for reports; that of a folder or pattern includes the number of its files.
    """

    field: str
    paths: tuple[Path, ...]
    names: tuple[str, ...]

    @classmethod
    def find(cls, field: str, given: Sequence[str]) -> FileList:
        """Returns the files that ``given`` names: files, folders, or patterns such as `data/*.jsonl`.

        A name that exists is not treated as a pattern, even if it has brackets.

        Raises:
            InputError: for a file that does not exist, is empty, or has an unknown ending.
        """
        paths: list[Path] = []
        names = []
        for name in given:
            matches = _matching(field, name)
            single = matches == [Path(name)]
            names.append(Path(name).name if single else f"{Path(name).name} ({len(matches)} files)")
            paths += matches
        for path in paths:
            _check(field, path)
        return cls(field, tuple(dict.fromkeys(paths)), tuple(names))

    @property
    def builder(self) -> str:
        """The builder of ``datasets`` that reads the files.

        Raises:
            InputError: if they are of several kinds.
        """
        builders = {BUILDERS[kind(path)] for path in self.paths}
        if len(builders) > 1:
            raise InputError(f"`{self.field}` must all be of one kind, got {[str(path) for path in self.paths]}.")
        return builders.pop()

    def read(self, encoding: str | None) -> Dataset:
        """Returns the rows of the files; a text file is one row with a column `text`.

        Args:
            encoding: Encoding of text, .csv and .json files; None is UTF-8.

        Raises:
            InputError: if a file cannot be read.
        """
        builder = self.builder
        extra: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
        if builder != "parquet":
            extra["encoding"] = _codec(encoding, builder)
        # ``datasets`` treats names as patterns: part[1].txt would read part1.txt
        names = [glob.escape(str(path)) for path in self.paths]
        try:
            return load_dataset(builder, data_files=names, split="train", **extra)
        except Exception as error:  # each builder has its own exceptions for a file that it cannot read
            if any(text in str(root_cause(error)) for text in NO_ROWS):
                raise InputError(f"`{self.field}` must name files with text in them, none has a row.") from error
            for path in self.paths if builder != "parquet" else ():
                _check_encoding(self.field, path, encoding)
            unreadable = InputError(f"`{self.field}` cannot be read as {builder}: {root_cause(error)}")
            raise cache_error(error) or unreadable from error


def kind(path: Path) -> str:
    """Returns the lower-case ending that names the format of a file, ignoring that of a compression.

    >>> kind(Path("Corpus.TXT.gz"))
    '.txt'
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


def _matching(field: str, name: str) -> list[Path]:
    """The files that one name stands for."""
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
    elif glob.has_magic(name):
        inside = (Path(file) for file in glob.iglob(name, recursive=True))
    else:
        raise InputError(f"`{field}` must name files that are there, got {name}.")
    files = sorted(file for file in inside if file.is_file() and file.stat().st_size)
    known = [file for file in files if kind(file) in BUILDERS]
    if not known:
        ends = ", ".join(BUILDERS)
        raise InputError(f"`{field}` must name files that are there, {name} has none that ends in {ends}.")
    return known


def _check(field: str, path: Path) -> None:
    """Raises InputError for a file that is empty, has an unknown ending, or needs a decompressor that is missing."""
    if path.stat().st_size == 0:
        raise InputError(f"`{field}` must name files with text in them, {path} is empty.")
    if kind(path) not in BUILDERS:
        raise InputError(f"`{field}` must end in {', '.join(BUILDERS)} (.gz and .zst may follow), got {path}.")
    if path.suffix.lower() == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise InputError(f"`{field}` needs zstandard to read {path}: pip install zstandard, or decompress the file.")


def check_encoding_name(encoding: str | None) -> None:
    """Raises InputError for an encoding that Python does not know."""
    try:
        codecs.lookup(encoding or UTF_8)
    except LookupError as error:
        raise InputError(
            "`data.encoding` must be null or an encoding that Python knows, such as latin-1 or utf-16, got "
            f"{encoding!r}."
        ) from error


def _codec(encoding: str | None, builder: str) -> str:
    """The name of the codec for a builder; the JSON builder skips a byte-order mark itself, but only for "utf-8"."""
    if encoding is not None and codecs.lookup(encoding).name != "utf-8":
        return encoding
    return "utf-8" if builder == "json" else UTF_8


def _check_encoding(field: str, path: Path, encoding: str | None) -> None:
    """Raises InputError, naming the first invalid byte, if a file is not in ``encoding``."""
    with fsspec.open(str(path.absolute()), "rb", compression="infer") as opened:
        data = opened.read()
    try:
        data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        has_mark = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        remedy = "utf-16, whose byte-order mark it has" if has_mark else "the one that it is in, such as latin-1"
        raise InputError(
            f"`{field}` must be text in {encoding or 'UTF-8'}: byte 0x{data[error.start]:02X} at position "
            f"{error.start} of {path} is not. Set `data.encoding` to {remedy}."
        ) from error


def root_cause(error: BaseException) -> str:
    """Returns the first line of the error at the start of the chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
