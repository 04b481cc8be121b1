"""Conversations rendered by a chat template, as tokens with labels on the answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.data.chat.messages import Message
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import IGNORED

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation.

    Attributes:
        ids: Token ids.
        labels: The ids of the answers and of the tokens that end them, -100 elsewhere.
        last_only: Whether only the last of several answers is labelled.
    """

    ids: list[int]
    labels: list[int]
    last_only: bool = False


def set_chat_template(tokenizer: Tokenizer, template: str | None, name: str) -> None:
    """Sets the chat template of ``tokenizer``.

    Args:
        tokenizer: The tokenizer.
        template: A Jinja template or a file with one; None keeps the tokenizer's own.
        name: Name of the tokenizer in error messages.

    Raises:
        InputError: if there is no template, it cannot be read, or the tokenizer is not a fast one.
    """
    if template is not None:
        tokenizer.chat_template = _read(template)
    if not tokenizer.chat_template:
        raise InputError(
            f"`data.instructions.chat_template` must be given, the tokenizer of {name} has none. Give a Jinja "
            "template, or a file with one."
        )
    if not tokenizer.is_fast:
        raise InputError(f"`data.instructions` needs a fast tokenizer, that of {name} is slow.")


def _read(template: str) -> str:
    if "{" in template:
        return template
    if not Path(template).is_file():
        raise InputError(f"`data.instructions.chat_template` must be a Jinja template or a file, got {template!r}.")
    return Path(template).read_text(encoding="utf-8")


def encode(messages: Sequence[Message], tokenizer: Tokenizer, where: str = "a row") -> Encoded:
    """Returns the tokens of a conversation, with labels on its answers.

    A template with `{% generation %}` marks the answers itself. Otherwise an answer is the text that its message adds
    to the rendered prompt, which is exactly what the model has to generate. Templates of reasoning models omit the
    reasoning of earlier answers, which are therefore rendered differently than when they were the last message: in
    such a conversation only the last answer is labelled.

    Raises:
        InputError: if the template cannot render the conversation, or does not show where its last answer begins.
    """
    try:
        if re.search(r"\{%-?\s*generation", str(tokenizer.chat_template)):
            rendered: Any = tokenizer.apply_chat_template(
                list(messages), return_dict=True, return_assistant_tokens_mask=True, tokenize=True
            )
            ids, masks = list(rendered["input_ids"]), rendered["assistant_masks"]
            return Encoded(ids, [i if answer else IGNORED for i, answer in zip(ids, masks, strict=True)])
        text = _rendered(tokenizer, messages)
        spans, last_only = _answers(tokenizer, messages, text, where)
    except TemplateError as error:
        raise InputError(f"`data.instructions`: the chat template cannot render {where}: {error}.") from error
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, labels = list(tokens["input_ids"]), []
    for token, (begin, end) in zip(ids, tokens["offset_mapping"], strict=True):
        answer = any(
            first < end and begin < last for first, last in spans
        )  # a token may begin with the space before an answer
        labels.append(token if answer else IGNORED)
    return Encoded(ids, labels, last_only)


def _answers(tokenizer: Tokenizer, messages: Sequence[Message], text: str, where: str) -> tuple[list[Span], bool]:
    """The spans of the answers in the rendered text, and whether only the last answer has one."""
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_answer(tokenizer, messages, index, text) for index in indices]
    complete = [span for span in spans if span is not None]
    if len(complete) == len(spans):
        return complete, False
    if spans[-1] is None:
        raise InputError(
            f"`data.instructions.chat_template` must mark answers with {{% generation %}}: it renders the beginning of "
            f"{where} differently with the last answer than without it."
        )
    return [spans[-1]], True


def _answer(tokenizer: Tokenizer, messages: Sequence[Message], index: int, text: str) -> Span | None:
    """The span of one answer; None if the conversation up to it is not a prefix of the rendered text."""
    prompt = _rendered(tokenizer, messages[:index], to_answer=True)
    answered = _rendered(tokenizer, messages[: index + 1])
    if not (answered.startswith(prompt) and text.startswith(answered)):
        return None
    return len(prompt), len(answered)


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], *, to_answer: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=to_answer))
