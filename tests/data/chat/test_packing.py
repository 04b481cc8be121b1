"""Conversations as items: padded to the longest, or packed, where each is what it is alone."""

import pytest
import torch

from lit_prune.allocate import LayerRedundancy
from lit_prune.data.chat.packing import PackedConversations, PaddedConversations
from lit_prune.evaluation.perplexity import IGNORED, measure
from lit_prune.models.families import supports_packing
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.slice import Slicing
from tests.conftest import FAMILIES, lively_model

ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}, {"input_ids": [5, 6], "labels": [-100, 6]}]


def test_padding_by_hand() -> None:
    rows = PaddedConversations(ROWS, pad=0)
    assert {name: tensor.tolist() for name, tensor in rows.collate([rows[0], rows[1]]).items()} == {
        "input_ids": [[1, 2, 3, 4], [5, 6, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[-100, -100, 3, 4], [-100, 6, -100, -100]],
    }
    assert rows.description == "2 conversations of up to 4 tokens"


def test_packing_by_hand() -> None:
    rows = PackedConversations([*ROWS, {"input_ids": [7, 8], "labels": [7, 8]}], seq_length=7, pad=0)
    assert rows.description == "2 windows of 7 tokens"
    assert {name: tensor.tolist() for name, tensor in rows[0].items()} == {
        "input_ids": [1, 2, 3, 4, 5, 6, 0],
        "labels": [-100, -100, 3, 4, -100, 6, -100],
        "position_ids": [0, 1, 2, 3, 0, 1, 0],
    }
    assert rows[1]["labels"].tolist() == [-100, 8, -100, -100, -100, -100, -100]  # nothing comes before the 7
    assert rows[1]["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_a_conversation_is_what_it_is_alone(family: str) -> None:
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 64, (length,), generator=random).tolist() for length in (9, 14, 5, 12)]
    rows = [{"input_ids": row, "labels": [IGNORED] * 3 + row[3:]} for row in ids]
    model, padded = lively_model(family), PaddedConversations(rows, pad=0)
    packed = PackedConversations(rows, seq_length=30, pad=0)
    alone = measure(model, [padded.collate([padded[index] for index in range(4)])], "x")
    batch = {name: torch.stack([packed[0][name], packed[1][name]]) for name in packed[0]}
    together = measure(model, [batch], "x")
    assert alone.protocol.tokens == together.protocol.tokens == sum(len(row) - 3 for row in ids)
    assert (together.perplexity == pytest.approx(alone.perplexity, rel=1e-4)) is supports_packing(model.config)
    del batch["position_ids"]
    assert measure(model, [batch], "x").perplexity != pytest.approx(alone.perplexity, rel=1e-4)


def test_packed_in_a_sliced_model() -> None:
    model = lively_model("llama")
    batches = list(torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(0)).split(2))
    prune(model, batches, Recipe(Slicing(), 0.25, LayerRedundancy()))
    rows = [
        {"input_ids": list(range(begin, begin + 9)), "labels": list(range(begin, begin + 9))} for begin in (1, 20, 40)
    ]
    padded, packed = PaddedConversations(rows, pad=0), PackedConversations(rows, seq_length=30, pad=0)
    alone = measure(model, [padded.collate([padded[index] for index in range(3)])], "x").perplexity
    together = measure(model, [{name: tensor[None] for name, tensor in packed[0].items()}], "x").perplexity
    assert together == pytest.approx(alone, rel=1e-4)
