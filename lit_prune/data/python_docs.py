"""The documentation of the running Python as named documents: language topics and docstrings.

Nothing is imported or downloaded: docstrings are read from the source files with ``ast``. A document is one module; its
part depends only on a hash of its name, so that training text of one Python version is not validation text of another.
A long paragraph in both parts is dropped from one of them: from validation if it is in the standard library's training
documents, from packages if it is in validation.
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
    """Returns the documents of one part, dicts of `name` and `text`, sorted by a hash of their names.

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
    """The documents of Python itself, cached since several thousand files are read for either part."""
    return {**_topics(), **_modules(Path(sysconfig.get_path("stdlib")), "", {"site-packages"})}


def _is_validation(name: str) -> bool:
    return _hash(name) % 10_000 < VALIDATION_SHARE * 10_000


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _documents(named: dict[str, list[tuple[str, str]]]) -> list[dict[str, str]]:
    """The documents, each the join of its (heading, text) pieces without texts that occurred before."""
    texts = set()
    documents = []
    for name in sorted(named, key=_hash):
        new_pieces = []
        for heading, text in named[name]:
            if text.strip() not in texts:
                texts.add(text.strip())
                new_pieces.append(f"{heading}\n{text}" if heading else text)
        if new_pieces:
            documents.append({"name": name, "text": "\n\n".join(new_pieces)})
    return documents


def _paragraphs(documents: list[dict[str, str]]) -> set[str]:
    """The paragraphs too long to occur in two documents by coincidence."""
    pieces = {piece.strip() for row in documents for piece in row["text"].split("\n\n")}
    return {piece for piece in pieces if len(piece) >= SHARED_CHARACTERS}


def _without(documents: list[dict[str, str]], paragraphs: set[str]) -> list[dict[str, str]]:
    """The documents without ``paragraphs``; a language topic may quote another one at length."""
    remaining = []
    for row in documents:
        text = "\n\n".join(piece for piece in row["text"].split("\n\n") if piece.strip() not in paragraphs)
        if text:
            remaining.append({**row, "text": text})
    return remaining


def _topics() -> dict[str, list[tuple[str, str]]]:
    from pydoc_data.topics import topics

    return {f"topics.{name}": [("", text)] for name, text in topics.items()}


def _modules(root: Path, prefix: str, skipped: set[str]) -> dict[str, list[tuple[str, str]]]:
    """The docstrings of each module by its dotted name, as pairs of a heading (``class Name``) and the text."""
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
