"""Python's documentation as two parts that share nothing."""

import hashlib
from pathlib import Path

import pytest

from lit_prune.data.python_docs import python_docs

MODULE = '''"""Top."""
class A:
    """Of A."""
    def f(self, x=1):
        """Of f."""
'''


def paragraphs(documents: list[dict[str, str]]) -> set[str]:
    pieces = {piece.strip() for row in documents for piece in row["text"].split("\n\n")}
    return {piece for piece in pieces if len(piece) >= 60}


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> dict[str, str]:
    """The training documents of packages that are nothing but ``files``, by name."""
    (folder / "package").mkdir()
    for name, text in files.items():
        (folder / "package" / f"{name}.py").write_text(text)
    paths = {"purelib": str(folder), "stdlib": str(Path(hashlib.__file__).parent)}
    monkeypatch.setattr("sysconfig.get_path", paths.get)
    documents = {row["name"]: row["text"] for row in python_docs("train", packages=True)}
    return {name.rpartition(".")[2]: text for name, text in documents.items() if name.startswith("site-packages.")}


def test_parts_share_no_text_and_depend_on_the_name() -> None:
    train, val = python_docs("train"), python_docs("validation")
    assert sum(len(row["text"]) for row in train) > 1e6
    assert sum(len(row["text"]) for row in val) > 5e4
    for documents, expected in ((train, False), (val, True)):
        numbers = [int.from_bytes(hashlib.sha256(row["name"].encode()).digest()[:8], "big") for row in documents]
        assert numbers == sorted(numbers)
        assert {number % 10_000 < 800 for number in numbers} == {expected}
    assert not paragraphs(val) & paragraphs(train)


def test_both_parts_are_one_mixture() -> None:
    for part in ("train", "validation"):
        names = [row["name"] for row in python_docs(part)]
        topics = [name for name in names if name.startswith("topics.")]
        assert topics
        assert len(topics) < len(names) / 2


def test_docstrings_have_headings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = installed(tmp_path, monkeypatch, m=MODULE, broken="def (", empty="x = 1")
    assert documents == {"m": "module package.m\nTop.\n\nclass A\nOf A.\n\ndef f(self, x=1)\nOf f."}


def test_a_text_is_in_one_document_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = '"""Nobody but these two modules says this."""'
    assert len(installed(tmp_path, monkeypatch, a=twice, b=twice)) == 1


def test_paragraphs_of_validation_are_dropped_and_short_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = next(piece for piece in sorted(paragraphs(python_docs("validation"))) if piece.isascii())
    documents = installed(tmp_path, monkeypatch, m=f"{f'A short one.{chr(10) * 2}{held_out}{chr(10) * 2}Rest.'!r}")
    assert documents == {"m": "module package.m\nA short one.\n\nRest."}
