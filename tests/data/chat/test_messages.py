"""The layouts of instruction data, and that they all come to the same messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset

from lit_prune.data.chat.messages import conversations_of
from lit_prune.errors import InputError

TALK = [{"role": "user", "content": "Open it."}, {"role": "assistant", "content": "It is open."}]
COLUMNS = {"messages": "messages", "prompt": "prompt", "answer": "completion"}


def read(rows: list[dict[str, Any]], folder: Path, **columns: str) -> list[list[dict[str, Any]]]:
    """The conversations of rows that were in a file, as ``datasets`` gives them."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    return list(conversations_of(found, "rows.jsonl", **(COLUMNS | columns)))


LAYOUTS: dict[str, dict[str, Any]] = {
    "openai": {"messages": TALK},
    "content parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Open "}, {"type": "text", "text": "it."}]},
            {"role": "assistant", "content": [{"type": "text", "text": "It is open."}]},
        ]
    },
    "prompt and completion": {"prompt": "Open it.", "completion": "It is open."},
    "trl": {"prompt": TALK[:1], "completion": TALK[1:]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Open it."}, {"from": "gpt", "value": "It is open."}]},
    "alpaca": {"instruction": "Open it.", "input": "", "output": "It is open."},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, tmp_path: Path) -> None:
    assert read([LAYOUTS[layout]] * 2, tmp_path) == [TALK, TALK]


def test_columns_of_other_names(tmp_path: Path) -> None:
    assert read([{"q": "Open it.", "a": "It is open.", "n": 1}], tmp_path, prompt="q", answer="a") == [TALK]
    assert read([{"talk": TALK}], tmp_path, messages="talk") == [TALK]


def test_the_input_of_alpaca_is_part_of_the_prompt(tmp_path: Path) -> None:
    row = {"instruction": "Open it.", "input": "a.txt", "output": "It is open."}
    assert read([row], tmp_path)[0][0]["content"] == "Open it.\n\na.txt"


def test_tool_calls_have_no_content_and_arguments_as_a_mapping(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "read", "arguments": '{"path": "a.txt"}'}}
    other = {"type": "function", "function": {"name": "list", "arguments": '{"folder": "x"}'}}
    rows = [
        {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [given]}, TALK[1]]}
        for given in (call, other)
    ]
    first, second = read(rows, tmp_path)
    assert first[1]["content"] == ""
    assert first[1]["tool_calls"][0]["function"] == {"name": "read", "arguments": {"path": "a.txt"}}
    assert second[1]["tool_calls"][0]["function"] == {"name": "list", "arguments": {"folder": "x"}}
    assert "tool_calls" not in first[0]


def test_arguments_that_are_mappings_have_only_what_was_given(tmp_path: Path) -> None:
    rows = [
        {"messages": [TALK[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}]}
        for given in ({"path": "a.txt"}, {"folder": "x"})
    ]
    assert [talk[1]["tool_calls"][0]["function"]["arguments"] for talk in read(rows, tmp_path)] == [
        {"path": "a.txt"},
        {"folder": "x"},
    ]


def test_texts_and_parts_in_one_column(tmp_path: Path) -> None:
    parts = LAYOUTS["content parts"]
    assert read([{"messages": TALK}, parts], tmp_path) == [TALK, TALK]


def test_an_answer_that_is_json_stays_text(tmp_path: Path) -> None:
    for answer in ('{"open": true}', "[1, 2]"):
        talk = [TALK[0], {"role": "assistant", "content": answer}]
        assert read([{"messages": talk}], tmp_path) == [talk]


def test_rows_without_a_conversation_are_empty(tmp_path: Path) -> None:
    assert read([{"messages": TALK}, {"messages": None}], tmp_path) == [TALK, []]
    assert read([{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": None}], tmp_path)[1] == []


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"text": "x"}, r"`data.instructions.messages` must be a column of rows.jsonl, .* it has text"),
    ({"messages": TALK[:1]}, "row 1 of rows.jsonl must have an answer"),
    (
        {"messages": [{"role": "user"}]},
        "each message of row 1 of rows.jsonl must have a `role` and a `content`, both texts",
    ),
    ({"messages": "x"}, "must have a `role` and a `content`, both texts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "must have a `role` and a `content`, both texts",
    ),
]


@pytest.mark.parametrize(("row", "message"), MISTAKES)
def test_rows_that_are_no_conversations(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(conversations_of(Dataset.from_list([row]), "rows.jsonl", **COLUMNS))
