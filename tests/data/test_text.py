"""Text as windows: rows, documents, what training must not share with validation, BOS."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from lit_prune.data.datamodule import TextDataModule
from lit_prune.data.text import PackedWindows, text_column
from lit_prune.errors import InputError
from tests.data.tokenizers import with_bos

SENTENCE = "Return the number of items in a container, and raise an error if there are none.\n"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(path: Path, rows: list[dict]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    windows = PackedWindows(torch.arange(11), 4)
    assert [window["input_ids"].tolist() for window in windows] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(PackedWindows(torch.arange(11), 4, limit=1)) == 1
    assert windows.description == "2 windows of 4 tokens"


def test_windows_begin_with_one_bos() -> None:
    windows = PackedWindows(torch.tensor([9, 1, 2, 3, 4, 5, 9, 6, 7]), 3, bos=9)
    assert [window["input_ids"].tolist() for window in windows] == [[9, 1, 2], [9, 3, 4], [9, 6, 7]]


def test_rows_end_in_the_end_of_text_token_or_are_joined(tmp_path: Path) -> None:
    rows = ["first row of text", "second row of text"]
    file = lines(tmp_path / "rows.jsonl", [{"text": row} for row in rows])
    data = TextDataModule(train_files=file, seq_length=2)
    tokens = [data.tokenizer(row)["input_ids"] for row in rows]
    assert data.stream("train").tolist() == [*tokens[0], 0, *tokens[1], 0]
    joined = TextDataModule(train_files=file, seq_length=2, separator="\n\n")
    assert joined.stream("train").tolist() == data.tokenizer("\n\n".join(rows))["input_ids"]


def test_empty_rows_are_no_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["first row of text", "", " \n", "second row of text"]
    file = lines(tmp_path / "rows.jsonl", [{"text": row} for row in rows])
    filled = lines(tmp_path / "filled.jsonl", [{"text": rows[0]}, {"text": rows[3]}])
    stream = TextDataModule(train_files=file, seq_length=2).stream("train")
    assert torch.equal(stream, TextDataModule(train_files=filled, seq_length=2).stream("train"))
    assert capsys.readouterr().err.count(f"2 of 4 rows of {file} are empty and are left out.") == 1
    joined = TextDataModule(train_files=file, seq_length=2, separator="|")
    assert torch.equal(joined.stream("train"), torch.tensor(joined.tokenizer("|".join(rows))["input_ids"]).int())


def test_every_window_begins_with_bos_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    tokenizer, bos = with_bos(tmp_path / "tokenizer")
    texts = {"train": SENTENCE * 9, "val": "Open the file and read its lines.\n" * 9}
    files = {f"{part}_files": write(tmp_path / f"{part}.txt", text) for part, text in texts.items()}
    data = TextDataModule(tokenizer, **files, seq_length=16, batch_size=2)
    papers = TextDataModule(tokenizer, **files, seq_length=16, batch_size=2, bos=False)
    stream = data.stream("train").tolist()
    assert stream == papers.stream("train").tolist()
    assert stream.count(bos) == 1
    assert data.windows("train")[0]["input_ids"].tolist() == stream[:16]
    assert data.windows("train")[1]["input_ids"].tolist() == [bos, *stream[16:31]]
    assert papers.windows("train")[1]["input_ids"].tolist() == stream[16:32]
    for batch in (*data.train_dataloader(), *data.val_dataloader()):
        assert (batch["input_ids"] == bos).sum(1).tolist() == [1] * len(batch["input_ids"])
        assert (batch["input_ids"][:, 0] == bos).all()
    windows, plain = data.calibration_windows(4, 8, 0), papers.calibration_windows(4, 8, 0)
    assert windows.positions == plain.positions
    assert (windows.input_ids_NT[:, 0] == bos).all()
    assert windows.input_ids_NT.tolist() != plain.input_ids_NT.tolist()
    assert (data.describe("val"), papers.describe("val")) == (
        "val.txt, BOS in every window",
        "val.txt, BOS once a text",
    )
    assert data.expected_settings()["data.bos"] is True
    assert papers.expected_settings()["data.bos"] is False


def test_documents_begin_with_one_bos_also_where_the_text_has_it(tmp_path: Path) -> None:
    tokenizer, bos = with_bos(tmp_path / "tokenizer")
    file = lines(tmp_path / "rows.jsonl", [{"text": "<s>first row"}, {"text": "second row"}])
    data = TextDataModule(tokenizer, train_files=file, seq_length=2)
    first, second = (data.tokenizer(row, add_special_tokens=False)["input_ids"] for row in ("first row", "second row"))
    assert data.stream("train").tolist() == [bos, *first, 0, bos, *second, 0]


def test_bos_for_a_tokenizer_that_adds_none(tmp_path: Path) -> None:
    file = lines(tmp_path / "rows.jsonl", [{"text": "first row"}, {"text": "second row"}])
    tokenizer, bos = with_bos(tmp_path / "tokenizer", adds=False)
    data = TextDataModule(tokenizer, train_files=file, seq_length=4, bos=True)
    assert all(window["input_ids"][0] == bos for window in data.windows("train"))
    assert data.describe("train") == "rows.jsonl, BOS in every window"


def test_parquet_and_another_column(tmp_path: Path) -> None:
    Dataset.from_dict({"body": [SENTENCE * 5], "n": [1]}).to_parquet(str(tmp_path / "rows.parquet"))
    data = TextDataModule(train_files=str(tmp_path / "rows.parquet"), text_column="body", seq_length=8)
    assert data.tokenizer.decode(data.stream("train")) == SENTENCE * 5


@pytest.mark.parametrize("separator", [None, ""])
def test_rows_of_validation_are_dropped_from_training(tmp_path: Path, separator: str | None) -> None:
    rows = [{"text": SENTENCE}, {"text": "only in training, and long enough\n"}]
    train, val = lines(tmp_path / "a.jsonl", rows), lines(tmp_path / "b.jsonl", rows[:1])
    data = TextDataModule(train_files=train, val_files=val, seq_length=4, separator=separator)
    assert data.tokenizer.decode(data.stream("train")).startswith("only in training")


def test_lines_of_validation_are_dropped_from_a_training_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, own = "a short line stays\n", "only in training, and long enough to be distinct from a phrase\n"
    train = write(tmp_path / "a.txt", SENTENCE + short + own)
    val = write(tmp_path / "b.txt", short + SENTENCE)
    data = TextDataModule(train_files=train, val_files=val, seq_length=4)
    text = data.tokenizer.decode(data.stream("train"))
    assert text == short + own
    assert "1 lines of training text are in the validation text too" in capsys.readouterr().err


def test_the_same_text_in_both_is_refused(tmp_path: Path) -> None:
    files = {f"{part}_files": write(tmp_path / f"{part}.txt", SENTENCE * 9) for part in ("train", "val")}
    with pytest.raises(InputError, match="training and validation text must not be the same"):
        TextDataModule(**files, seq_length=8).setup("fit")


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lines(tmp_path / "a.jsonl", [{"text": SENTENCE}, {"text": None}])
    assert TextDataModule(train_files=file, seq_length=4).stream("train").tolist()[-1] != 0  # one document is left
    assert f"1 of 2 rows of {file} have no text and are left out" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["\n", "\ufeff", "  \n \n"])
def test_a_file_of_nothing(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="`data`: the train text must not be empty, .*a.txt has none"):
        TextDataModule(train_files=write(tmp_path / "a.txt", text)).stream("train")


def test_rows_that_are_all_without_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the train text must not be empty"):
        TextDataModule(train_files=lines(tmp_path / "a.jsonl", [{"text": None}, {"text": ""}])).stream("train")


@pytest.mark.parametrize(
    ("values", "held"),
    [([1], "int64"), ([["a"]], "list"), ([{"a": "b"}], "dict"), ([[{"a": "b"}]], "list")],
)
def test_a_column_of_something_else(values: list, held: str) -> None:
    with pytest.raises(InputError, match=f"must be a column of text, 'body' of rows.jsonl holds {held}"):
        text_column(Dataset.from_dict({"body": values}), "body", "rows.jsonl")


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(InputError, match="must be a column of rows.jsonl, got 'text'; it has body"):
        text_column(Dataset.from_dict({"body": ["a"]}), "text", "rows.jsonl")


def test_text_shorter_than_a_window(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the train text has 2 tokens, one window needs 64"):
        TextDataModule(train_files=write(tmp_path / "a.txt", "two words"), seq_length=64).stream("train")
