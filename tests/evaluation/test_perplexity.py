import math

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_prune.evaluation import perplexity
from lit_prune.evaluation.perplexity import Perplexity, Protocol, measure, negative_log_likelihood


def test_uniform_logits_give_the_size_of_the_vocabulary() -> None:
    metric = Perplexity()
    metric.update(torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long))
    assert float(metric.compute()) == pytest.approx(7)
    assert int(metric.tokens) == 8


def test_shifted_by_one() -> None:
    ids = torch.tensor([[0, 1, 2]])
    logits = torch.full((1, 3, 3), -50.0)
    logits[0, 0, 1] = logits[0, 1, 2] = 50.0  # each position is sure of the next token
    nll, tokens = negative_log_likelihood(logits, ids)
    assert (float(nll), tokens) == (pytest.approx(0, abs=1e-6), 2)


def test_padding_on_either_side_is_left_out() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 6, 9), torch.randint(0, 9, (1, 6))
    expected = negative_log_likelihood(logits[:, 1:5], ids[:, 1:5])
    nll, tokens = negative_log_likelihood(logits, ids, torch.tensor([[0, 1, 1, 1, 1, 0]]))
    assert tokens == expected[1] == 3
    assert float(nll) == pytest.approx(float(expected[0]))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 40, 9), torch.randint(0, 9, (2, 40))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    monkeypatch.setattr(perplexity, "rows_at_once", lambda logits: 7)
    assert float(negative_log_likelihood(logits, ids)[0]) == pytest.approx(float(expected), rel=1e-6)


def test_finite_on_half_precision_logits_where_softmax_underflows() -> None:
    logits = torch.zeros(1, 2, 4, dtype=torch.float16)
    logits[0, 0, 0] = 60
    metric = Perplexity()
    metric.update(logits, torch.tensor([[0, 1]]))
    assert float(metric.compute()) == pytest.approx(math.exp(60), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_full_precision(dtype: torch.dtype) -> None:
    metric = Perplexity()
    metric.update(torch.zeros(2, 5, 7, dtype=dtype), torch.zeros(2, 5, dtype=torch.long))
    assert float(metric.compute()) == pytest.approx(7, rel=1e-6)


def test_sums_over_batches_not_means_of_means() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 8, 5), torch.randint(0, 5, (3, 8))
    whole, parts = Perplexity(), Perplexity()
    whole.update(logits, ids)
    parts.update(logits[:1], ids[:1])
    parts.update(logits[1:], ids[1:])
    assert float(whole.compute()) == pytest.approx(float(parts.compute()))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"got \(1, 3, 5\) and \(1, 4\)"):
        Perplexity().update(torch.zeros(1, 3, 5), torch.zeros(1, 4, dtype=torch.long))


def test_measure_agrees_with_the_models_own_loss(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    model.train()
    found = measure(model, [{"input_ids": batch} for batch in batches], "noise")
    with torch.no_grad():
        losses = [model(batch, labels=batch).loss for batch in batches]
    assert found.perplexity == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert found.protocol == Protocol(data="noise", windows=6, seq_length=16, tokens=90, dtype="float32")
    assert model.training


def test_measure_of_nothing(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="at least one token, got none"):
        measure(model, [], "nothing")


def test_blocks_that_are_moved_in_turn_give_the_same_perplexity(
    model: PreTrainedModel, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [{"input_ids": ids} for ids in batches]
    whole = measure(model, given, "noise")
    calls: list[int] = []
    streamed = perplexity.streamed_logits
    monkeypatch.setattr(perplexity, "streamed_logits", lambda *args: calls.append(1) or streamed(*args))
    found = measure(model, given, "noise", device=torch.device("cpu"), streamed=True)
    assert calls == [1]
    assert found.perplexity == pytest.approx(whole.perplexity)
    assert found.protocol == whole.protocol
