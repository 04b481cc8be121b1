"""Conversations as training data: rendered by a chat template, with loss only on the answers, packed or padded.

rows -> messages -> text rendered by the template -> tokens, and labels on the answers -> windows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, final

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.data.base import DatasetKind, Part, Source, WindowSizes, concatenated
from lit_prune.data.bos import Bos
from lit_prune.data.chat.messages import conversations_of
from lit_prune.data.chat.packing import Example, PackedConversations, PaddedConversations
from lit_prune.data.chat.template import encode
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import IGNORED
from lit_prune.progress import log


@dataclass(frozen=True)
class Instructions:
    """The columns of instruction data, its chat template, and whether conversations are packed.

    Rows with `conversations` (ShareGPT) or `instruction`, `input` and `output` (Alpaca) are read without further
    settings.

    Args:
        messages: Column of the conversations, each a list of `role` and `content`.
        prompt: Column of the prompts (texts or lists of messages), for rows without a column of conversations.
        answer: Column of the answers to the prompts.
        chat_template: A Jinja template, or a file with one; null uses the tokenizer's own. It is saved with the
            tokenizer.
        packed: Put as many whole conversations into a window of `data.seq_length` tokens as fit; attention stays within
            each conversation. False makes every conversation a row, padded to the longest of its batch.
    """

    messages: str = "messages"
    prompt: str = "prompt"
    answer: str = "completion"
    chat_template: str | None = None
    packed: bool = False


@final
class ConversationData(DatasetKind):
    """The conversations of a source, with loss only on the answers.

    Args:
        source: Where the rows come from.
        tokenizer: A tokenizer with a chat template.
        sizes: The length and the number of windows.
        instructions: The columns, and whether conversations are packed.
        bos: Whether conversations begin with BOS.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        sizes: WindowSizes,
        *,
        instructions: Instructions,
        bos: bool | None = None,
    ) -> None:
        self.source, self.tokenizer, self.sizes, self.instructions = source, tokenizer, sizes, instructions
        self._bos = Bos.of(tokenizer, bos)
        self.bos = self._bos.window
        self.settings: dict[str, Any] = {"data.instructions": repr(instructions), "data.bos": self.bos is not None}
        self._examples: dict[Part, list[Example]] = {}
        self._streams: dict[Part, Tensor] = {}

    def examples(self, part: Part) -> list[Example]:
        """Returns the conversations of a part as tokens and labels; a part is read once."""
        if part not in self._examples:
            rows = self._conversations(part)
            if part == "train" and self.source.may_overlap:
                rows = without_held_out(rows, self._conversations("val"))
            self._examples[part] = examples(rows, self.tokenizer, self.sizes.tokens(part), self._bos)
        return self._examples[part]

    def stream(self, part: Part) -> Tensor:
        """Returns all tokens of a part in order, shape (tokens,) int32."""
        if part not in self._streams:
            self._streams[part] = concatenated([row["input_ids"] for row in self.examples(part)])
        return self._streams[part]

    def items(self, part: Part) -> PaddedConversations | PackedConversations:
        """Returns the conversations of a part, or windows of packed conversations."""
        limit = self.sizes.count(part)
        # padding is masked, so any token will do; a padding token that was added later may have no row in the embedding
        pad = next((i for i in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) if i is not None), 0)
        if self.instructions.packed:
            return PackedConversations(self.examples(part), self.sizes.tokens(part), pad, limit)
        return PaddedConversations(self.examples(part), pad, limit)

    def describe(self, part: Part) -> str:
        """Returns the source of a part's conversations, with a note that only answers count."""
        return f"{self.source.describe(part)}, answers alone{self._bos.note}"

    def _conversations(self, part: Part) -> Dataset:
        return conversations(self.source.rows(part), self.source.where(part), self.instructions)


def conversations(rows: Dataset, where: str, instructions: Instructions) -> Dataset:
    """Returns a data set with one column, `messages`: the conversations as JSON, without rows that have none.

    Args:
        rows: Rows in one of the supported layouts, see :func:`conversations_of`.
        where: Name of the rows in error messages.
        instructions: The columns.

    Raises:
        InputError: if the columns do not exist, a conversation has no answer, or no row has a conversation.
    """
    names = {"messages": instructions.messages, "prompt": instructions.prompt, "answer": instructions.answer}
    encoded = [json.dumps(messages) for messages in conversations_of(rows, where, **names) if messages]
    if missing := len(rows) - len(encoded):
        log(f"{missing} of {len(rows)} rows of {where} have no conversation and are left out.")
    if not encoded:
        raise InputError(f"`data.instructions`: {where} must have conversations, no row has one.")
    return Dataset.from_dict({"messages": encoded})


def examples(conversations: Dataset, tokenizer: Tokenizer, limit: int, bos: Bos) -> list[Example]:
    """Returns the token ids and labels of the conversations, cut to ``limit`` tokens, without those left unanswered.

    Raises:
        InputError: if no conversation is left, or the template cannot render one.
    """
    remaining, cut, last_only = [], 0, 0
    for number, messages in enumerate(conversations["messages"], start=1):
        encoded = encode(json.loads(messages), tokenizer, f"row {number}")
        ids = bos.begin(encoded.ids)
        added = len(ids) - len(encoded.ids)  # negative if both the template and the text had BOS
        labels = [IGNORED] * added + encoded.labels[max(-added, 0) :]
        cut, last_only = cut + (len(ids) > limit), last_only + encoded.last_only
        if any(label != IGNORED for label in labels[1:limit]):
            remaining.append({"input_ids": ids[:limit], "labels": labels[:limit]})
    if last_only:
        log(
            f"{last_only} of {len(conversations)} conversations train on their last answer alone, as the chat template "
            "renders earlier answers differently once others follow."
        )
    if cut:
        log(
            f"{cut} of {len(conversations)} conversations are longer than {limit} tokens and are cut; "
            f"{len(conversations) - len(remaining)} have no answer left and are left out."
        )
    if not remaining:
        raise InputError(
            f"`data.seq_length` must be longer: no conversation has an answer in its first {limit} tokens."
        )
    return remaining


def without_held_out(conversations: Dataset, held_out: Dataset) -> Dataset:
    """Returns the conversations that are not in ``held_out``, and logs the number of those that are.

    Raises:
        InputError: if none is left.
    """
    excluded = set(held_out["messages"])
    remaining = [messages for messages in conversations["messages"] if messages not in excluded]
    if dropped := len(conversations) - len(remaining):
        log(f"{dropped} conversations of the training data are in the validation data too, and are left out.")
    if not remaining:
        raise InputError("`data`: training and validation data must not be the same.")
    return Dataset.from_dict({"messages": remaining})
