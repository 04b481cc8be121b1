"""Conversations as training data: rendered by a chat template, loss on the answers alone, packed or padded.

rows -> messages -> text by the template -> tokens, of which those of the answers are labels -> windows.
Sizes: N windows or conversations, B batch, T tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import IGNORED
from lit_prune.progress import log

Message = dict[str, str]
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Instructions:
    """What rows of instruction data are, and how they become windows.

    Args:
        messages: Column of the conversations, each a list of `role` and `content`.
        prompt: Column of what is asked, for rows without a column of conversations.
        answer: Column of what is to be answered.
        chat_template: A Jinja template, or a file that has one; null takes the tokenizer's own. It is saved with the
            tokenizer.
        packed: Put as many whole conversations into a window of `data.seq_length` tokens as fit, each seeing itself
            alone; false makes every conversation a row, padded to the longest of its batch.
    """

    messages: str = "messages"
    prompt: str = "prompt"
    answer: str = "completion"
    chat_template: str | None = None
    packed: bool = False

    def ready(self, tokenizer: Tokenizer, name: str) -> None:
        """Gives ``tokenizer`` the template.

        Raises:
            InputError: if there is none, or it cannot be read.
        """
        if self.chat_template is not None:
            tokenizer.chat_template = _template(self.chat_template)
        if not tokenizer.chat_template:
            raise InputError(
                f"`data.instructions.chat_template` must be given, the tokenizer of {name} has none: a Jinja template, "
                "or a file that has one."
            )
        if not tokenizer.is_fast:
            raise InputError(f"`data.instructions` needs a fast tokenizer, that of {name} is none.")

    def conversations(self, rows: Dataset, where: str) -> Dataset:
        """Returns ``rows`` with one column, `messages`; they are checked.

        Raises:
            InputError: if the columns are not there, or a row is no conversation that has an answer.
        """
        if self.messages in rows.column_names:
            listed = [[_plain(message) for message in row] for row in rows[self.messages]]
        elif {self.prompt, self.answer} <= set(rows.column_names):
            pairs = zip(rows[self.prompt], rows[self.answer], strict=True)
            listed = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for prompt, answer in pairs
            ]
        else:
            raise InputError(
                f"`data.instructions.messages` must be a column of {where}, or `prompt` and `answer` must be, got "
                f"{self.messages!r}, {self.prompt!r} and {self.answer!r}; it has {', '.join(rows.column_names)}."
            )
        for number, messages in enumerate(listed, start=1):
            _check(messages, f"row {number} of {where}")
        return Dataset.from_dict({"messages": [json.dumps(messages) for messages in listed]})


def _template(given: str) -> str:
    """The template itself, of a template or the file that has it."""
    if "{" in given:
        return given
    if not Path(given).is_file():
        raise InputError(f"`data.instructions.chat_template` must be a Jinja template or a file, got {given!r}.")
    return Path(given).read_text(encoding="utf-8")


def _plain(message: Any) -> Any:
    """A message without the fields that only others of its data set have."""
    return {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else message


def _check(messages: Sequence[Any], where: str) -> None:
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"`data.instructions`: {where} must be made of texts, a `role` and a `content` each.")
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"`data.instructions`: {where} must have an answer, a message whose role is assistant.")


def examples(conversations: Dataset, tokenizer: Tokenizer, limit: int) -> list[Example]:
    """Returns the token ids and labels of every conversation, cut to ``limit`` tokens; those left without answer go.

    Raises:
        InputError: if no conversation is left, or the template cannot render one.
    """
    kept, cut = [], 0
    for number, messages in enumerate(conversations["messages"], start=1):
        ids, labels = encode(json.loads(messages), tokenizer, f"row {number}")
        cut += len(ids) > limit
        if any(label != IGNORED for label in labels[1:limit]):
            kept.append({"input_ids": ids[:limit], "labels": labels[:limit]})
    if cut:
        log(
            f"{cut} of {len(conversations)} conversations are longer than {limit} tokens and are cut; "
            f"{len(conversations) - len(kept)} keep no answer and are left out."
        )
    if not kept:
        raise InputError(
            f"`data.seq_length` must be longer: no conversation has an answer in its first {limit} tokens."
        )
    return kept


def encode(messages: Sequence[Message], tokenizer: Tokenizer, where: str = "a row") -> tuple[list[int], list[int]]:
    """Returns the token ids of a conversation, and its labels: the ids of the answers, with what ends them, else -100.

    A template with `{% generation %}` says itself what an answer is. Otherwise it is what rendering one message more
    adds to the prompt, so that what is trained is what has to be generated.
    """
    try:
        if re.search(r"\{%-?\s*generation", str(tokenizer.chat_template)):
            told: Any = tokenizer.apply_chat_template(
                list(messages), return_dict=True, return_assistant_tokens_mask=True, tokenize=True
            )
            ids = list(told["input_ids"])
            return ids, [i if own else IGNORED for i, own in zip(ids, told["assistant_masks"], strict=True)]
        text = _rendered(tokenizer, messages)
        spans = list(_answers(tokenizer, messages, text, where))
    except TemplateError as error:
        raise InputError(f"`data.instructions`: the chat template cannot render {where}: {error}.") from error
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, labels = list(tokens["input_ids"]), []
    for token, (begin, end) in zip(ids, tokens["offset_mapping"], strict=True):
        own = any(first < end and begin < last for first, last in spans)  # a space before it may be part of a token
        labels.append(token if own else IGNORED)
    return ids, labels


def _answers(tokenizer: Tokenizer, messages: Sequence[Message], text: str, where: str) -> Iterator[tuple[int, int]]:
    """Where the answers stand in the rendered text."""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _rendered(tokenizer, messages[:index], to_answer=True)
        answered = _rendered(tokenizer, messages[: index + 1])
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise InputError(
                f"`data.instructions.chat_template` must mark answers by {{% generation %}}: the beginning of {where} "
                "is rendered otherwise than the whole."
            )
        yield len(prompt), len(answered)


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], *, to_answer: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=to_answer))


def without(conversations: Dataset, held_out: Dataset) -> Dataset:
    """Returns the conversations that are not among those held out; says how many are."""
    gone = set(held_out["messages"])
    kept = [messages for messages in conversations["messages"] if messages not in gone]
    if dropped := len(conversations) - len(kept):
        log(f"{dropped} conversations of the training data stand in the validation data too, and are left out.")
    if not kept:
        raise InputError("`data`: training and validation data must not be the same.")
    return Dataset.from_dict({"messages": kept})


class Conversations(TorchDataset):
    """One conversation an item: ``{"input_ids": (T,), "labels": (T,)}``; :meth:`collate` pads a batch of them.

    Args:
        rows: What :func:`examples` returned.
        pad: Token id that padding has.
        limit: Keep only the first so many.
    """

    def __init__(self, rows: Sequence[Example], pad: int, limit: int | None = None) -> None:
        self.rows, self.pad = rows[:limit], pad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: torch.tensor(values) for key, values in self.rows[index].items()}

    @property
    def told(self) -> str:
        """How many there are, and how long."""
        return f"{len(self)} conversations of up to {max(len(row['input_ids']) for row in self.rows)} tokens"

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns a batch, padded on the right, (B, T) each: `input_ids`, `attention_mask` and `labels`."""
        ids, labels = ([item[key] for item in items] for key in ("input_ids", "labels"))
        ones = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": _padded(ids, self.pad),
            "attention_mask": _padded(ones, 0),
            "labels": _padded(labels, IGNORED),
        }


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


class PackedConversations(TorchDataset):
    """Windows of whole conversations: ``{"input_ids": (T,), "labels": (T,), "position_ids": (T,)}``.

    Positions begin anew with each conversation, by which transformers keeps attention within it; what is left of a
    window is one more, of padding. A conversation that does not fit begins the next window.

    Args:
        rows: What :func:`examples` returned, none longer than a window.
        seq_length: T, tokens per window.
        pad: Token id that padding has.
        limit: Keep only the first so many windows.
    """

    def __init__(self, rows: Sequence[Example], seq_length: int, pad: int, limit: int | None = None) -> None:
        windows: list[list[Example]] = []
        for row in rows:
            used = sum(len(other["input_ids"]) for other in windows[-1]) if windows else seq_length
            if used + len(row["input_ids"]) > seq_length:
                windows.append([])
            windows[-1].append(row)
        self.seq_length, self.pad, self.windows = seq_length, pad, windows[:limit]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index]
        left = self.seq_length - sum(len(row["input_ids"]) for row in window)
        filled = [*window, {"input_ids": [self.pad] * left, "labels": [IGNORED] * left}]
        return {
            "input_ids": torch.tensor([i for row in filled for i in row["input_ids"]]),
            "labels": torch.tensor([i for row in filled for i in [IGNORED, *row["labels"][1:]][: len(row["labels"])]]),
            "position_ids": torch.tensor([i for row in filled for i in range(len(row["input_ids"]))]),
        }

    @property
    def told(self) -> str:
        """How many there are, and how long."""
        return f"{len(self)} windows of {self.seq_length} tokens"
