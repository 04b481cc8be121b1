"""Conversations, lists of messages with `role` and `content`, from the usual layouts of instruction data.

The layouts are OpenAI's `messages`, ShareGPT's `conversations` (`from`, `value`), prompt and completion (texts, or
TRL's lists of messages), and Alpaca's `instruction`, `input` and `output`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from lit_prune.errors import InputError

Message = dict[str, Any]
SHAREGPT = "conversations"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
ALPACA = ("instruction", "output")


def conversations_of(rows: Dataset, where: str, *, messages: str, prompt: str, answer: str) -> Iterator[list[Message]]:
    """Yields the conversation of every row, an empty list for a row without one.

    Args:
        rows: Rows of one of the layouts.
        where: Name of the rows in error messages.
        messages: Column of conversations.
        prompt: Column of prompts.
        answer: Column of the answers to the prompts.

    Raises:
        InputError: if the layout of the rows is unknown, or a conversation has no answer.
    """
    columns = set(rows.column_names)
    column = next((name for name in (messages, SHAREGPT) if name in columns), None)
    for number, row in enumerate(_layout_rows(rows, where, column, (messages, prompt, answer)), start=1):
        if column is not None:
            conversation = _messages(row[column], None)
        elif {prompt, answer} <= columns:
            conversation = [*_messages(row[prompt], "user"), *_messages(row[answer], "assistant")]
            conversation = conversation if row[prompt] is not None and row[answer] is not None else []
        else:
            conversation = _alpaca(row)
        if conversation:
            _check(conversation, f"row {number} of {where}")
        yield conversation


def _layout_rows(rows: Dataset, where: str, column: str | None, names: tuple[str, str, str]) -> Dataset:
    columns, (messages, prompt, answer) = set(rows.column_names), names
    if column is not None:
        return rows.select_columns(column)
    if {prompt, answer} <= columns or set(ALPACA) <= columns:
        return rows
    raise InputError(
        f"`data.instructions.messages` must be a column of {where}, or `prompt` and `answer` must be, got "
        f"{messages!r}, {prompt!r} and {answer!r}; it has {', '.join(rows.column_names)}."
    )


def _messages(value: Any, role: str | None) -> list[Any]:
    """The messages in a column: a list of messages, or the text of a single message by ``role``."""
    if value is None:
        return []
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": value}]
    return [_message(item) for item in value] if isinstance(value, list) else [value]


def _message(item: Any) -> Any:
    """A message with OpenAI's keys, without those that only other messages of the data set have."""
    item = _without_nulls(_decoded(item))
    if not isinstance(item, dict):
        return item
    if "from" in item and "value" in item:
        item = {"role": SHAREGPT_ROLES.get(item["from"], item["from"]), "content": item["value"]}
    content = item.get("content")
    parts = _decoded(content)
    if isinstance(parts, list) and all(isinstance(part, dict) and "type" in part for part in parts):
        content = _joined_parts(parts)
    if content is None and item.get("tool_calls"):
        content = ""  # some templates render None as the text "None"
    calls = {"tool_calls": [_call(call) for call in item["tool_calls"]]} if item.get("tool_calls") else {}
    return item | calls | {"content": content}


def _joined_parts(parts: list[Any]) -> Any:
    """The text of OpenAI's content parts joined; the parts themselves if one is not text."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if len(strings) == len(parts) else parts


def _call(call: Any) -> Any:
    """A tool call with its arguments as a mapping, which templates expect, where OpenAI has JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    return call | {"function": function | {"arguments": _decoded(arguments)}}


def _decoded(value: Any) -> Any:
    """``value``, decoded if it is JSON of a mapping or list, as ``datasets`` stores columns of mixed types."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _without_nulls(value: Any) -> Any:
    """``value`` without the keys that ``datasets`` has filled with None because only other rows have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _alpaca(row: dict[str, Any]) -> list[Message]:
    instruction, output = (row[name] for name in ALPACA)
    if instruction is None or output is None:
        return []
    context = row.get("input")
    prompt = f"{instruction}\n\n{context}" if context else instruction
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": output}]


def _check(messages: list[Any], where: str) -> None:
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(
                f"`data.instructions`: each message of {where} must have a `role` and a `content`, both texts."
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"`data.instructions`: {where} must have an answer, a message whose role is assistant.")
