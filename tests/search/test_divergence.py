"""The divergence by hand, and of a model whose last hidden states were recorded."""

import math

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import Search, Uniform
from lit_prune.errors import InputError
from lit_prune.pipeline import score
from lit_prune.recipe import Recipe
from lit_prune.search.divergence import appended, compared, divergence, recorded
from lit_prune.slice import Slicing
from tests.conftest import small_model


def test_by_hand() -> None:
    reference, logits = torch.zeros(2, 2), torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    expected = math.log(2 / math.sqrt(3))
    assert float(divergence(reference, logits)) == pytest.approx(expected / 2)
    assert float(divergence(reference[:1], logits[:1])) == pytest.approx(expected)
    assert float(divergence(logits, logits)) == 0


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    one, other = (torch.randn(20, 5, generator=random) for _ in range(2))
    whole = divergence(one, other)
    monkeypatch.setattr("lit_prune.search.divergence.rows_at_once", lambda logits: 3)
    torch.testing.assert_close(divergence(one, other), whole)


def test_tokens_that_are_compared() -> None:
    assert compared(8, None, None).tolist() == list(range(7))  # the last token predicts none
    assert compared(8, None, 7).tolist() == list(range(7))
    assert compared(8, None, 3).tolist() == [1, 3, 5]
    assert compared(8, None, 1).tolist() == [3]
    assert compared(6, torch.tensor([[0, 1, 1, 1, 0, 0]]), None).tolist() == [1, 2]
    assert compared(1025, None, 256).diff().tolist() == [4] * 255


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "falcon", "mixtral"])
def test_a_recorded_row_has_the_logits_that_it_had(family: str, batches: list[torch.Tensor]) -> None:
    model: PreTrainedModel = small_model(family)
    one, other = batches[0][:1], batches[1][:1]
    with torch.no_grad():
        with recorded(model) as hidden:
            expected = model(input_ids=one).logits
        rows = torch.tensor([0, 3, 4])
        with appended(model, hidden[0], rows):
            both = model(input_ids=other).logits
        torch.testing.assert_close(both, torch.cat([model(input_ids=other).logits, expected])[:, rows])
    assert len(hidden) == 1


def test_a_sliced_head_is_refused(batches: list[torch.Tensor]) -> None:
    recipe = Recipe(Slicing(multiple=2, slice_head=True), 0.25, Search(Uniform(), evaluations=40, step=0.1, loss="kl"))
    with pytest.raises(InputError, match="`Search.loss` must be cross_entropy for a method that slices the head"):
        score(small_model(), batches, recipe)
    kept = Recipe(Slicing(multiple=2), 0.25, Search(Uniform(), evaluations=40, step=0.1, loss="kl"))
    assert score(small_model(), batches, kept).search["loss_start"] > 0
