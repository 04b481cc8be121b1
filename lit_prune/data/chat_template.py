"""Conversations rendered by a chat template: their tokens, and which of these are answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.data.messages import Message
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import IGNORED

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens.

    Attributes:
        ids: Token ids.
        labels: The ids of the answers and of what ends them, else -100.
        last_only: Whether only the last of several answers is labelled.
    """

    ids: list[int]
    labels: list[int]
    last_only: bool = False


def give_template(tokenizer: Tokenizer, template: str | None, name: str) -> None:
    """Gives ``tokenizer`` a chat template.

    Args:
        tokenizer: The tokenizer.
        template: A Jinja template or the file that has one; None leaves the tokenizer's own.
        name: Name of the tokenizer in error messages.

    Raises:
        InputError: if there is none, or it cannot be read.
    """
    if template is not None:
        tokenizer.chat_template = _read(template)
    if not tokenizer.chat_template:
        raise InputError(
            f"`data.instructions.chat_template` must be given, the tokenizer of {name} has none: a Jinja template, "
            "or a file that has one."
        )
    if not tokenizer.is_fast:
        raise InputError(f"`data.instructions` needs a fast tokenizer, that of {name} is none.")


def _read(template: str) -> str:
    if "{" in template:
        return template
    if not Path(template).is_file():
        raise InputError(f"`data.instructions.chat_template` must be a Jinja template or a file, got {template!r}.")
    return Path(template).read_text(encoding="utf-8")


def encode(messages: Sequence[Message], tokenizer: Tokenizer, where: str = "a row") -> Encoded:
    """Returns the tokens of a conversation, and which of them are answers.

    A template with `{% generation %}` marks the answers itself. Otherwise an answer is what rendering one message more
    adds to the prompt, so that what is trained is what has to be generated. Templates of models that think leave the
    thoughts of earlier answers out, which are then rendered otherwise than when they were the last: of such
    conversations the last answer alone is labelled.

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
        answer = any(first < end and begin < last for first, last in spans)  # a space before it may be part of a token
        labels.append(token if answer else IGNORED)
    return Encoded(ids, labels, last_only)


def _answers(tokenizer: Tokenizer, messages: Sequence[Message], text: str, where: str) -> tuple[list[Span], bool]:
    """The answers' places in the rendered text, and whether there is one for the last alone."""
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_answer(tokenizer, messages, index, text) for index in indices]
    complete = [span for span in spans if span is not None]
    if len(complete) == len(spans):
        return complete, False
    if spans[-1] is None:
        raise InputError(
            f"`data.instructions.chat_template` must mark answers by {{% generation %}}: the beginning of {where} "
            "is rendered otherwise than the whole."
        )
    return [spans[-1]], True


def _answer(tokenizer: Tokenizer, messages: Sequence[Message], index: int, text: str) -> Span | None:
    """The place of one answer; None where the conversation up to it is rendered otherwise than the whole."""
    prompt = _rendered(tokenizer, messages[:index], to_answer=True)
    answered = _rendered(tokenizer, messages[: index + 1])
    if not (answered.startswith(prompt) and text.startswith(answered)):
        return None
    return len(prompt), len(answered)


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], *, to_answer: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=to_answer))
