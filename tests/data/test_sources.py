"""Where rows come from, and what reports call it."""

from pathlib import Path

import pytest
from datasets import Dataset

from lit_prune.data.base import Part
from lit_prune.data.files import FileList
from lit_prune.data.sources import HubDataset, LocalFiles, PythonDocs
from lit_prune.errors import InputError

SPLITS: dict[Part, str] = {"train": "train", "val": "validation", "test": "test"}


def files(**named: Path) -> LocalFiles:
    parts: tuple[Part, ...] = ("train", "val", "test")
    return LocalFiles({p: FileList.find(f"data.{p}_files", [str(named[p])] if p in named else []) for p in parts})


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("training")
    (tmp_path / "b.jsonl").write_text('{"text": "validation"}\n')
    source = files(train=tmp_path / "a.txt", val=tmp_path / "b.jsonl")
    assert list(source.rows("train")["text"]) == ["training"]
    assert (source.is_plain("train"), source.is_plain("val")) == (True, False)
    assert (source.describe("train"), source.where("val")) == ("a.txt", str(tmp_path / "b.jsonl"))
    assert source.may_overlap
    assert not files(train=tmp_path / "a.txt").may_overlap
    with pytest.raises(InputError, match="`data.test_files` must be given: local files replace `data.source`"):
        source.rows("test")
    with pytest.raises(InputError, match="`data.train_files` and `data.test_files` must not share text, both name"):
        files(train=tmp_path / "a.txt", test=tmp_path / "a.txt")


def test_python_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "lit_prune.data.sources.python_docs",
        lambda part, packages: asked.append((part, packages)) or [{"name": "a", "text": part}],
    )
    source = PythonDocs(packages=True)
    assert [source.rows(part)["text"][0] for part in ("train", "val", "test")] == ["train", "validation", "validation"]
    assert asked[0] == ("train", True)
    assert source.is_plain("val")
    assert not source.may_overlap
    assert source.describe("val") == "python-docs (validation documents)"


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str, name: str | None, split: str) -> Dataset:
        return Dataset.from_dict({"text": [f"{source} {name} {split}"]})

    monkeypatch.setattr("lit_prune.data.sources.load_dataset", load)
    source = HubDataset("some/set", "raw", SPLITS)
    assert source.rows("val")["text"][0] == "some/set raw validation"
    assert source.describe("val") == "some/set raw, split validation"
    assert source.may_overlap
    assert not source.is_plain("val")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "`data.source` must be given"),
        ("python-doc", "Did you mean python-docs"),
        ("./folder", "for ./folder use `data.train_files`"),
        ("nobody/nothing", r"`data.source` 'nobody/nothing' .*cannot be loaded.*use `data.train_files`"),
    ],
)
def test_data_sets_that_cannot_be_read(source: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        HubDataset(source, None, SPLITS).rows("train")


def test_one_split_for_both() -> None:
    with pytest.raises(InputError, match="`data.train_split` and `data.val_split` must differ, both are 'test'"):
        HubDataset("some/set", None, SPLITS | {"train": "test", "val": "test"})
