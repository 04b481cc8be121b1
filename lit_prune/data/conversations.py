"""Conversations as training data: rendered by a chat template, loss on the answers alone, packed or padded.

rows -> messages -> text by the template -> tokens, of which those of the answers are labels -> windows.
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
from lit_prune.data.chat_template import encode
from lit_prune.data.messages import conversations_of
from lit_prune.data.packing import Example, PackedConversations, PaddedConversations
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import IGNORED
from lit_prune.progress import log


@dataclass(frozen=True)
class Instructions:
    """The columns of instruction data, and how its rows become windows.

    Rows with `conversations` (ShareGPT) or `instruction`, `input` and `output` (Alpaca) are read without further
    settings.

    Args:
        messages: Column of the conversations, each a list of `role` and `content`.
        prompt: Column of the prompts, texts or lists of messages, for rows without a column of conversations.
        answer: Column of the answers to them.
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


@final
class ConversationData(DatasetKind):
    """Conversations of a source, of which the answers are learnt.

    Args:
        source: Where the rows come from.
        tokenizer: A tokenizer with a chat template.
        sizes: How long windows are.
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
        """Returns the conversations of a part as tokens and labels; they are read once."""
        if part not in self._examples:
            rows = self._conversations(part)
            if part == "train" and self.source.may_overlap:
                rows = without(rows, self._conversations("val"))
            self._examples[part] = examples(rows, self.tokenizer, self.sizes.tokens(part), self._bos)
        return self._examples[part]

    def stream(self, part: Part) -> Tensor:
        """Returns all tokens of a part in order, shape (tokens,) int32."""
        if part not in self._streams:
            self._streams[part] = concatenated([row["input_ids"] for row in self.examples(part)])
        return self._streams[part]

    def items(self, part: Part) -> PaddedConversations | PackedConversations:
        """Returns the conversations of a part, or windows of them where they are packed."""
        limit = self.sizes.count(part)
        # padding is masked, so that any token serves; one that was added for it may be beyond the model's embedding
        pad = next((i for i in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) if i is not None), 0)
        if self.instructions.packed:
            return PackedConversations(self.examples(part), self.sizes.tokens(part), pad, limit)
        return PaddedConversations(self.examples(part), pad, limit)

    def describe(self, part: Part) -> str:
        """Returns the source of a part's conversations, and that answers alone count."""
        return f"{self.source.describe(part)}, answers alone{self._bos.note}"

    def _conversations(self, part: Part) -> Dataset:
        return conversations(self.source.rows(part), self.source.where(part), self.instructions)


def conversations(rows: Dataset, where: str, instructions: Instructions) -> Dataset:
    """Returns ``rows`` with one column, `messages`, of conversations as JSON; rows without one are left out.

    Args:
        rows: Rows of a layout of instruction data.
        where: Name of the rows in error messages.
        instructions: The columns.

    Raises:
        InputError: if the columns are not there, a row is no conversation that has an answer, or no row has one at all.
    """
    names = {"messages": instructions.messages, "prompt": instructions.prompt, "answer": instructions.answer}
    talks = [json.dumps(talk) for talk in conversations_of(rows, where, **names) if talk]
    if missing := len(rows) - len(talks):
        log(f"{missing} of {len(rows)} rows of {where} have no conversation and are left out.")
    if not talks:
        raise InputError(f"`data.instructions`: {where} must have conversations, no row has one.")
    return Dataset.from_dict({"messages": talks})


def examples(conversations: Dataset, tokenizer: Tokenizer, limit: int, bos: Bos) -> list[Example]:
    """Returns the token ids and labels of every conversation, cut to ``limit`` tokens; one left without answer goes.

    Raises:
        InputError: if no conversation is left, or the template cannot render one.
    """
    kept, cut, last_only = [], 0, 0
    for number, messages in enumerate(conversations["messages"], start=1):
        encoded = encode(json.loads(messages), tokenizer, f"row {number}")
        ids = bos.begin(encoded.ids)
        added = len(ids) - len(encoded.ids)  # negative where the template and the text both had BOS
        labels = [IGNORED] * added + encoded.labels[max(-added, 0) :]
        cut, last_only = cut + (len(ids) > limit), last_only + encoded.last_only
        if any(label != IGNORED for label in labels[1:limit]):
            kept.append({"input_ids": ids[:limit], "labels": labels[:limit]})
    if last_only:
        log(
            f"{last_only} of {len(conversations)} conversations train on their last answer alone, as the chat template "
            "renders the earlier ones otherwise than when they were the last."
        )
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


def without(conversations: Dataset, held_out: Dataset) -> Dataset:
    """Returns the conversations that are not among those held out; logs how many are.

    Raises:
        InputError: if none is left.
    """
    excluded = set(held_out["messages"])
    kept = [messages for messages in conversations["messages"] if messages not in excluded]
    if dropped := len(conversations) - len(kept):
        log(f"{dropped} conversations of the training data are in the validation data too, and are left out.")
    if not kept:
        raise InputError("`data`: training and validation data must not be the same.")
    return Dataset.from_dict({"messages": kept})
