import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from lit_prune import distributed
from lit_prune.data.datamodule import PackedWindows, TextDataModule
from lit_prune.errors import InputError

SENTENCE = "Return the number of items in a container, and raise an error if there are none.\n"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(tmp_path / "train.txt", SENTENCE * 40)


@pytest.fixture
def val(tmp_path: Path) -> str:
    return write(tmp_path / "val.txt", "Open the file and read its lines.\n" * 60)


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    windows = PackedWindows(torch.arange(11), 4)
    assert [window["input_ids"].tolist() for window in windows] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(PackedWindows(torch.arange(11), 4, limit=1)) == 1


def test_a_text_file_is_tokenised_as_one_string(train: str, val: str) -> None:
    data = TextDataModule(train_files=train, val_files=[val], seq_length=16, batch_size=4)
    data.setup("fit")
    expected = data.tokenizer(Path(train).read_text())["input_ids"]
    assert data.stream("train").tolist() == expected
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].shape == (4, 16)
    assert batch["input_ids"].flatten().tolist() == data.stream("val")[:64].tolist()
    assert data.describe("val") == "val.txt"


def test_rows_end_in_the_end_of_text_token_or_are_joined(tmp_path: Path) -> None:
    rows = ["first row of text", "second row of text"]
    file = write(tmp_path / "rows.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows))
    data = TextDataModule(train_files=file, seq_length=2)
    tokens = [data.tokenizer(row)["input_ids"] for row in rows]
    assert data.stream("train").tolist() == [*tokens[0], 0, *tokens[1], 0]
    joined = TextDataModule(train_files=file, seq_length=2, separator="\n\n")
    assert joined.stream("train").tolist() == data.tokenizer("\n\n".join(rows))["input_ids"]


def test_parquet_and_another_column(tmp_path: Path) -> None:
    Dataset.from_dict({"body": [SENTENCE * 5], "n": [1]}).to_parquet(str(tmp_path / "rows.parquet"))
    data = TextDataModule(train_files=str(tmp_path / "rows.parquet"), text_column="body", seq_length=8)
    assert data.tokenizer.decode(data.stream("train")) == SENTENCE * 5


def test_local_files_replace_the_source(train: str) -> None:
    data = TextDataModule(source="nobody/nothing", train_files=train, seq_length=8)
    assert len(data.stream("train")) > 8
    with pytest.raises(InputError, match="`data.val_files` must be given: local files replace `data.source`"):
        data.setup("validate")


def test_calibration_windows_come_from_the_training_text(train: str, val: str) -> None:
    data = TextDataModule(train_files=train, val_files=val, seq_length=16)
    windows = data.calibration_windows(3, 20, seed=0)
    stream = data.stream("train").tolist()
    for window, start in zip(windows.input_ids_NT.tolist(), windows.positions, strict=True):
        assert window == stream[start : start + 20]


def test_training_windows_are_shuffled_by_the_seed(train: str, val: str) -> None:
    def order(seed: int) -> list[list[int]]:
        data = TextDataModule(train_files=train, val_files=val, seq_length=16, seed=seed)
        return [row for batch in data.train_dataloader() for row in batch["input_ids"].tolist()]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))


def test_fewer_training_windows_than_processes_are_told_at_once(
    train: str, val: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextDataModule(train_files=train, val_files=val, seq_length=300)
    data.setup("fit")
    count = len(data.windows("train"))
    monkeypatch.setattr(distributed, "number", lambda: count + 1)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with pytest.raises(InputError, match=f"must have a window for every process, got {count} for {count + 1} proc"):
        data.setup("fit")
    data.setup("validate")


def test_validation_is_capped(train: str, val: str) -> None:
    data = TextDataModule(train_files=train, val_files=val, seq_length=8, batch_size=4, val_windows=6)
    assert [len(batch["input_ids"]) for batch in data.val_dataloader()] == [4, 2]


@pytest.mark.parametrize("separator", [None, ""])
def test_rows_of_validation_are_dropped_from_training(tmp_path: Path, separator: str | None) -> None:
    rows = [{"text": SENTENCE}, {"text": "only in training, and long enough\n"}]
    train = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    val = write(tmp_path / "b.jsonl", json.dumps(rows[0]) + "\n")
    data = TextDataModule(train_files=train, val_files=val, seq_length=4, separator=separator)
    assert data.tokenizer.decode(data.stream("train")).startswith("only in training")


def test_lines_of_validation_are_dropped_from_a_training_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, own = "a short line stays\n", "only in training, and long enough to be told apart from a phrase\n"
    train = write(tmp_path / "a.txt", SENTENCE + short + own)
    val = write(tmp_path / "b.txt", short + SENTENCE)
    data = TextDataModule(train_files=train, val_files=val, seq_length=4)
    text = data.tokenizer.decode(data.stream("train"))
    assert text == short + own
    assert "1 lines of training text stand in the validation text too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": 1}\n', "must be a column of text, 'text' of .* holds int64"),
        ('{"text": "a"}\n{"text": null}\n', "1 rows of .* have no text"),
    ],
)
def test_a_column_that_is_no_text(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextDataModule(train_files=write(tmp_path / "a.jsonl", content)).stream("train")


def test_the_same_text_in_both_is_refused(tmp_path: Path, train: str) -> None:
    with pytest.raises(InputError, match="`data.train_files` and `data.val_files` must not share text"):
        TextDataModule(train_files=train, val_files=train)
    copy = write(tmp_path / "copy.txt", Path(train).read_text())
    with pytest.raises(InputError, match="training and validation text must not be the same"):
        TextDataModule(train_files=train, val_files=copy, seq_length=8).setup("fit")
    with pytest.raises(InputError, match="`data.train_split` and `data.val_split` must differ"):
        TextDataModule(source="some/set", train_split="test", val_split="test")


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"train": ["a first row\n", "a second row\n"], "test": ["held out, every word of it\n"]}
    asked = []

    def load(source: str, name: str | None, split: str) -> Dataset:
        asked.append((source, name, split))
        return Dataset.from_dict({"text": parts[split]})

    monkeypatch.setattr("lit_prune.data.datamodule.load_dataset", load)
    data = TextDataModule(source="some/set", name="raw", val_split="test", separator="", seq_length=4)
    data.setup("fit")
    assert data.tokenizer.decode(data.stream("train")) == "a first row\na second row\n"
    assert ("some/set", "raw", "test") in asked
    assert data.describe("val") == "some/set raw, split test"


def test_a_hub_data_set_that_cannot_be_had() -> None:
    with pytest.raises(InputError, match=r"`data.source` 'nobody/nothing' .*cannot be loaded.*use `data.train_files`"):
        TextDataModule(source="nobody/nothing").setup("fit")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty.txt is empty"),
        ("odd.csv", "a,b", "must end in .txt"),
        ("short.txt", "two words", "one window needs 64"),
        ("rows.jsonl", '{"body": "x"}\n', "must be a column of .*rows.jsonl, got 'text'; it has body"),
        ("broken.jsonl", "{", "cannot be read as json"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        TextDataModule(train_files=file, seq_length=64).stream("train")


def test_files_that_are_not_there() -> None:
    with pytest.raises(InputError, match="`data.train_files` must name files that are there, got none.txt"):
        TextDataModule(train_files="none.txt")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_length": 1}, "`data.seq_length` must be at least 2"),
        ({"batch_size": 0}, "`data.batch_size` must be at least 1"),
        ({"val_windows": 0}, "`data.val_windows` must be at least 1"),
        ({"source": None}, "`data.source` must be given"),
        ({"source": "python-doc"}, "Did you mean python-docs"),
        ({"source": "./folder"}, "for ./folder use `data.train_files`"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextDataModule(**fields).stream("train")  # type: ignore[arg-type]
