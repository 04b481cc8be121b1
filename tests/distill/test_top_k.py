"""TopK: windows are identified by tokens and positions, whatever their batch and padding."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from lit_prune.distill import Student, TopK
from lit_prune.errors import InputError
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA
from tests.conftest import small_model
from tests.distill.cases import IDS, STUDENTS, kept, says


def test_windows_are_known_by_their_tokens() -> None:
    model = small_model()
    looked: list[int] = []

    def windows() -> Iterable[dict[str, torch.Tensor]]:
        for rows in ([0, 1], [2], [1, 0]):
            looked.append(len(rows))
            yield {"input_ids": IDS[rows], "attention_mask": torch.ones_like(IDS[rows])}

    teaching = kept(TopK(5), model, STUDENTS["LoRA"], windows=windows())
    expected = model(IDS).logits.log_softmax(-1).topk(5, -1)
    for rows in ([2, 0], [1]):
        output: Any = teaching.output({"input_ids": IDS[rows]})
        assert torch.equal(output.tokens_NK, expected.indices[rows].flatten(0, 1))
        torch.testing.assert_close(output.log_q_NK, expected.values[rows].flatten(0, 1), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="must not be TopK if the training dataloader gives other windows"):
        teaching.output({"input_ids": IDS.flip(1)})
    mask = torch.ones_like(IDS)
    mask[:, -1] = 0
    with pytest.raises(InputError, match="gives other windows"):
        teaching.output({"input_ids": IDS, "attention_mask": mask})
    teaching.output({"input_ids": IDS, "position_ids": torch.arange(16)[None]})
    with pytest.raises(InputError, match="gives other windows"):
        teaching.output({"input_ids": IDS, "position_ids": torch.arange(1, 17)[None]})
    with pytest.raises(
        InputError, match="if the LLM is called with cache_position, which its outputs were computed without"
    ):
        teaching.output({"input_ids": IDS, "cache_position": torch.arange(16)})


def padded(rows: list[torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids = torch.nn.functional.pad(ids, (0, pad))
    mask = torch.stack([torch.arange(ids.shape[1]) < len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def test_padded_windows_are_known_whatever_they_share_a_batch_with() -> None:
    """As conversations, which are padded to the longest of their batch: in another epoch to another length."""
    model, rows = small_model(), [IDS[0, :5], IDS[1, :9], IDS[2, :9]]
    teaching = kept(TopK(64), model, STUDENTS["LoRA"], windows=[padded(rows[:2], 0), padded(rows[2:], 2)])
    assert teaching.size_bytes() == (5 + 9 + 9) * 64 * 6
    log_p = torch.randn(2 * 12, 64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    output = teaching.output(padded([rows[2], rows[0]], 3))
    found = output.log_q(torch.arange(24), log_p, 1.0).unflatten(0, (2, 12))
    for row, said in ((rows[2], found[0]), (rows[0], found[1])):
        expected = model(row[None]).logits[0].log_softmax(-1)
        torch.testing.assert_close(said[: len(row)], expected, rtol=1e-3, atol=4e-3)
    assert torch.equal(found[0, 9:], log_p[9:12])  # nothing is said of padding
    assert torch.equal(found[1, 5:], log_p[17:])


def test_packed_windows_are_known_by_their_positions_too() -> None:
    model, positions = small_model(), torch.cat([torch.arange(6), torch.arange(10)])[None]
    packed = {"input_ids": IDS[:1], "position_ids": positions}
    teaching = kept(TopK(64), model, STUDENTS["LoRA"], windows=[packed])
    expected = model(**packed, use_cache=False).logits[0].log_softmax(-1)
    assert (expected - model(IDS[:1]).logits[0].log_softmax(-1)).abs().max() > 0.01
    assert (says(teaching, model, IDS[:1], position_ids=positions) - expected).abs().max() < 4e-3
    with pytest.raises(InputError, match="gives other windows"):
        teaching.output({"input_ids": IDS[:1]})


def test_words_are_looked_up_at_step_0_alone() -> None:
    with pytest.raises(InputError, match="must not be TopK if the first cut comes after step 0, .* a cut at 5"):
        TopK().check(Student(Recipe(), LoRA(), (5,)))
