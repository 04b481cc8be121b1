"""Conversations as a kind of data: examples, what is left out, loaders."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_prune.data.chat.conversations import Instructions
from lit_prune.data.datamodule import TextDataModule
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import IGNORED
from tests.data.chat.test_template import THINKING, TURNS
from tests.data.tokenizers import with_bos


def module(tmp_path: Path, rows: list[dict], held_out: list[dict] | None = None, **fields: object) -> TextDataModule:
    for name, lines in {"train": rows, "val": held_out or rows[-1:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    settings: dict = {"instructions": Instructions(chat_template=TURNS), "seq_length": 64, "batch_size": 2}
    files = {f"{name}_files": str(tmp_path / f"{name}.jsonl") for name in ("train", "val")}
    return TextDataModule(**{**files, **settings, **fields})


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"What is {number}?", "completion": f"It is a number, {number}."}


def examples(data: TextDataModule) -> list[dict[str, list[int]]]:
    return data.kind.examples("train")  # type: ignore[attr-defined]


def test_rows_of_messages_and_of_pairs_are_the_same(tmp_path: Path) -> None:
    pairs = [pair(number) for number in range(6)]
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in pairs
    ]
    first = examples(module(tmp_path, pairs))
    assert len(first) == 5
    assert first == examples(module(tmp_path, talks))
    named = [{"q": row["prompt"], "a": row["completion"], "other": 1} for row in pairs]
    columns = Instructions(prompt="q", answer="a", chat_template=TURNS)
    assert first == examples(module(tmp_path, named, instructions=columns))


def test_what_is_in_validation_is_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = module(tmp_path, [pair(number) for number in range(6)], [pair(2), pair(9)])
    assert len(examples(data)) == 5
    assert "1 conversations of the training data are in the validation data too" in capsys.readouterr().err
    with pytest.raises(InputError, match="training and validation data must not be the same"):
        examples(module(tmp_path, [pair(1)], [pair(1), pair(2)]))


def test_rows_without_a_conversation_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert len(examples(module(tmp_path, [{"messages": talk}, {"messages": None}], [pair(1)]))) == 1
    assert "1 of 2 rows of" in capsys.readouterr().err
    with pytest.raises(InputError, match="train.jsonl must have conversations, no row has one"):
        examples(module(tmp_path, [{"messages": []}], [pair(1)]))


def test_long_conversations_are_cut_and_those_without_answer_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "word " * 60, "completion": "never read"}
    data = module(tmp_path, [pair(1), {"prompt": "What?", "completion": "word " * 90}, long, pair(2)])
    assert [len(row["input_ids"]) <= 64 for row in examples(data)] == [True, True]
    assert (
        "2 of 3 conversations are longer than 64 tokens and are cut; 1 have no answer left" in capsys.readouterr().err
    )
    with pytest.raises(
        InputError, match=r"`data.seq_length` must be longer: no conversation has an answer in its first"
    ):
        examples(module(tmp_path, [long, pair(2)]))


def test_conversations_that_train_on_their_last_answer_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [
        message
        for number in range(2)
        for message in (
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": f"<think>a</think>{number}"},
        )
    ]
    data = module(tmp_path, [{"messages": talk}], [pair(1)], instructions=Instructions(chat_template=THINKING))
    (row,) = examples(data)
    assert "<think>" in data.tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert "1 of 1 conversations train on their last answer alone" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [False, True])
def test_loaders(tmp_path: Path, packed: bool) -> None:
    rows = [pair(number) for number in range(40)]
    data = module(tmp_path, rows, instructions=Instructions(chat_template=TURNS, packed=packed), val_windows=1)
    batches = list(data.train_dataloader())
    assert sum(int((batch["labels"] != IGNORED).sum()) for batch in batches) == sum(
        label != IGNORED for row in examples(data) for label in row["labels"]
    )
    assert ("position_ids" in batches[0]) is packed
    assert len(data.val_dataloader()) == 1
    assert data.describe("val") == "val.jsonl, answers alone"
    windows = data.calibration_windows(2, 16, 0)
    assert windows.input_ids_NT.shape == (2, 16)
    assert "packed" in data.resume_settings()["data.instructions"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("template", [TURNS, "{{ bos_token }}" + TURNS], ids=["without", "with"])
def test_every_conversation_begins_with_one_bos(tmp_path: Path, packed: bool, template: str) -> None:
    folder, bos = with_bos(tmp_path / "tokenizer")
    fields = {"tokenizer": folder, "instructions": Instructions(chat_template=template, packed=packed)}
    data = module(tmp_path, [pair(number) for number in range(9)], **fields)
    plain = module(tmp_path, [pair(number) for number in range(9)], bos=False, **fields)
    for row, other in zip(examples(data), examples(plain), strict=True):
        assert row["input_ids"].index(bos) == 0
        assert row["input_ids"].count(bos) == 1
        assert row["labels"][0] == IGNORED
        without = [i for i in other["input_ids"] if i != bos]
        assert row["input_ids"][1:] == without
        assert [i for i in row["labels"] if i != IGNORED] == [i for i in other["labels"] if i != IGNORED]
    assert data.describe("val") == "val.jsonl, answers alone, BOS in every window"
    assert data.windows("train")[0]["input_ids"][0] == bos
    assert (data.calibration_windows(3, 8, 0).input_ids_NT[:, 0] == bos).all()


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"instructions": Instructions()}, r"chat_template` must be given, the tokenizer of embedded has none"),
    ({"separator": "x"}, r"`data.separator` must be left out with `data.instructions`"),
    ({"train_files": None, "val_files": None}, r"`data.instructions` needs `data.train_files`"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES, ids=[message[:40] for *_, message in MISTAKES])
def test_settings_that_do_not_go_together(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        examples(module(tmp_path, [pair(1)], [pair(9)], **fields))
