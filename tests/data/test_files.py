"""Local files: which ones a name stands for, and that they are read as they were written."""

import gzip
import importlib.util
from pathlib import Path

import pytest
from datasets import Dataset

from lit_prune.data.files import FileList, check_encoding_name
from lit_prune.errors import InputError


def find(*names: Path | str) -> FileList:
    return FileList.find("data.train_files", [str(name) for name in names])


def texts(*names: Path | str, encoding: str | None = None) -> list[str]:
    return list(find(*names).read(encoding)["text"])


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_brackets_in_a_name_are_no_pattern(tmp_path: Path) -> None:
    own = written(tmp_path / "part[1].txt", "mine")
    written(tmp_path / "part1.txt", "another")
    inside = written(tmp_path / "run[2]" / "text?.txt", "in a folder")
    assert texts(own) == ["mine"]
    assert texts(inside) == ["in a folder"]
    assert find(own).names == ("part[1].txt",)


def test_patterns_and_folders_stand_for_their_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.md", ".hidden/d.txt", "notes.pdf"):
        written(tmp_path / "docs" / name, f"text of {name}")
    written(tmp_path / "docs" / "empty.txt", "")
    assert texts(tmp_path / "docs" / "*.txt") == ["text of a.txt", "text of b.txt"]
    folder = find(tmp_path / "docs")
    assert [path.name for path in folder.paths] == ["a.txt", "b.txt", "c.md"]
    assert folder.names == ("docs (3 files)",)
    assert find(tmp_path / "docs" / "**" / "*.md").names == ("*.md (1 files)",)
    assert len(find(tmp_path / "docs", tmp_path / "docs" / "a.txt").paths) == 3
    for nothing in ("*.jsonl", "[ab].csv"):
        with pytest.raises(InputError, match="must name files that are there, .* has none that ends in .txt"):
            find(tmp_path / "docs" / nothing)


def test_endings_in_capitals_and_compressed_files(tmp_path: Path) -> None:
    assert texts(written(tmp_path / "A.TXT", "loud")) == ["loud"]
    assert texts(written(tmp_path / "a.txt.gz", gzip.compress(b"packed"))) == ["packed"]
    assert texts(written(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a row"}\n'))) == ["a row"]


def test_zstandard_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "zstandard" else own(name, *a))
    with pytest.raises(InputError, match="needs zstandard to read .*a.txt.zst: pip install zstandard, or decompress"):
        find(written(tmp_path / "a.txt.zst", b"x"))


def test_rows_of_csv_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["one, two", "three"], "n": [1, 2]})
    rows.to_csv(str(tmp_path / "a.csv"), index=False)
    rows.to_json(str(tmp_path / "a.jsonl"))
    rows.to_parquet(str(tmp_path / "a.parquet"))
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        assert texts(tmp_path / name) == ["one, two", "three"]
    with pytest.raises(InputError, match="`data.train_files` must all be of one kind, got "):
        texts(tmp_path / "a.csv", tmp_path / "a.jsonl")


def test_line_ends_and_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    assert texts(written(tmp_path / "a.txt", "one\r\ntwo\r\n")) == ["one\ntwo\n"]
    assert texts(written(tmp_path / "b.txt", "\ufeffmarked")) == ["marked"]
    assert texts(written(tmp_path / "c.csv", "\ufefftext\nmarked\n")) == ["marked"]
    for name in ("d.jsonl", "e.jsonl"):
        written(tmp_path / name, '\ufeff{"text": "marked"}\n')
    assert texts(tmp_path / "d.jsonl", tmp_path / "e.jsonl") == ["marked", "marked"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "UTF-8", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    assert texts(written(tmp_path / "a.txt", "café ö\n".encode(encoding)), encoding=encoding) == ["café ö\n"]
    table = "text\ncafé ö\n"
    assert texts(written(tmp_path / "a.csv", table.encode(encoding)), encoding=encoding) == ["café ö"]


def test_another_encoding_names_the_byte_and_the_remedy(tmp_path: Path) -> None:
    latin = written(tmp_path / "latin.txt", "café".encode("latin-1"))
    with pytest.raises(
        InputError,
        match=r"`data.train_files` must be text in UTF-8: byte 0xE9 at position 3 of .*latin.txt is not. Set "
        r"`data.encoding` to the one that it is in, such as latin-1",
    ):
        texts(latin)
    with pytest.raises(InputError, match=r"byte 0xFF at position 0 of .*wide.txt .* to utf-16, whose byte-order mark"):
        texts(written(tmp_path / "wide.txt", "text".encode("utf-16")))
    with pytest.raises(InputError, match="must be text in ascii: byte 0xE9 at position 3 of .*latin.txt"):
        texts(latin, encoding="ascii")
    with pytest.raises(InputError, match="byte 0xE9 at position 3 of .*latin.txt.gz"):
        texts(written(tmp_path / "latin.txt.gz", gzip.compress("café".encode("latin-1"))))
    with pytest.raises(InputError, match="`data.encoding` must be null or an encoding that .* got 'klat'"):
        check_encoding_name("klat")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty.txt is empty"),
        ("odd.pdf", "a,b", r"must end in .txt, .* \(.gz and .zst may follow\), got .*odd.pdf"),
        ("rows.csv", "text\n", "must name files with text in them, none has a row"),
        ("broken.jsonl", "{", "cannot be read as json"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        texts(written(tmp_path / name, content))


def test_files_that_are_not_there() -> None:
    with pytest.raises(InputError, match="`data.train_files` must name files that are there, got none.txt"):
        find("none.txt")


def test_text_is_not_blamed_for_a_cache_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("A line.\n")
    (tmp_path / "home").write_text("a file where the folder should be")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "home" / "datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match="`HF_HOME`, the environment variable, must name a folder that can be written"):
        FileList.find("data.train_files", [str(tmp_path / "a.txt")]).read(None)
