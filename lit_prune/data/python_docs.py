"""The documentation inside every Python as named documents: language topics and docstrings.

Nothing is imported or downloaded: docstrings are read from the source files with ``ast``. A document is one module; a
hash of its name alone decides which part it belongs to, so that training text of one Python version is not validation
text of another. A longer paragraph that is in both parts is dropped from one of them: from validation if the standard
library's training documents have it, from packages if validation has it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

VALIDATION_SHARE = 0.08
SHARED_CHARACTERS = 60
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip", "__pycache__"}
Part = Literal["train", "validation"]


def python_docs(part: Part, packages: bool = False) -> list[dict[str, str]]:
    """Returns the documents of one part, each a dict of `name` and `text`, in the order of a hash of their names.

    Args:
        part: `train` or `validation`; both are the same mixture of language topics and module docstrings.
        packages: Add the docstrings of all installed packages to the training part (tens of megabytes).
    """
    standard = _standard()
    training = {name: pieces for name, pieces in standard.items() if not _is_validation(name)}
    validation = {name: pieces for name, pieces in standard.items() if _is_validation(name)}
    held_out = _without(_documents(validation), _paragraphs(_documents(training)))
    if part == "validation":
        return held_out
    if packages:
        training |= _modules(Path(sysconfig.get_path("purelib")), "site-packages.", set())
    return _without(_documents(training), _paragraphs(held_out))


@functools.cache
def _standard() -> dict[str, list[tuple[str, str]]]:
    """The documents of Python itself; several thousand files are read, once for both parts."""
    return {**_topics(), **_modules(Path(sysconfig.get_path("stdlib")), "", {"site-packages"})}


def _is_validation(name: str) -> bool:
    return _hash(name) % 10_000 < VALIDATION_SHARE * 10_000


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _documents(named: dict[str, list[tuple[str, str]]]) -> list[dict[str, str]]:
    """Joins each document's (heading, text) pieces, leaving out texts that an earlier one has."""
    texts = set()
    documents = []
    for name in sorted(named, key=_hash):
        fresh = []
        for heading, text in named[name]:
            if text.strip() not in texts:
                texts.add(text.strip())
                fresh.append(f"{heading}\n{text}" if heading else text)
        if fresh:
            documents.append({"name": name, "text": "\n\n".join(fresh)})
    return documents


def _paragraphs(documents: list[dict[str, str]]) -> set[str]:
    """The paragraphs that are too long to be in two documents by coincidence."""
    pieces = {piece.strip() for row in documents for piece in row["text"].split("\n\n")}
    return {piece for piece in pieces if len(piece) >= SHARED_CHARACTERS}


def _without(documents: list[dict[str, str]], paragraphs: set[str]) -> list[dict[str, str]]:
    """Drops ``paragraphs`` from every document; a language topic may quote another one at length."""
    kept = []
    for row in documents:
        text = "\n\n".join(piece for piece in row["text"].split("\n\n") if piece.strip() not in paragraphs)
        if text:
            kept.append({**row, "text": text})
    return kept


def _topics() -> dict[str, list[tuple[str, str]]]:
    from pydoc_data.topics import topics

    return {f"topics.{name}": [("", text)] for name, text in topics.items()}


def _modules(root: Path, prefix: str, skipped: set[str]) -> dict[str, list[tuple[str, str]]]:
    """Each module's docstrings by its dotted name, each with a heading that names what it documents."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if (SKIPPED_FOLDERS | skipped).isdisjoint(parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):  # templates, and test data that is broken on purpose
                continue
            name = prefix + ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            if pieces := list(_docstrings(tree, f"module {name.removeprefix(prefix)}")):
                modules[name] = pieces
    return modules


def _docstrings(node: ast.AST, heading: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
        text := ast.get_docstring(node)
    ):
        yield heading, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"class {child.name}")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"def {child.name}({ast.unparse(child.args)})")
