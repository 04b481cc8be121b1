"""The loss of a trial is the model's own, over whole windows, padding left out."""

import math
from collections.abc import Sequence
from contextlib import suppress

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.evaluation.perplexity import measure
from lit_prune.search.divergence import compared
from lit_prune.search.trial import NamedTrial, Trial, model_on_device
from tests.conftest import small_model


class AsItIs(Trial):
    granularity = (1, 1, 1)

    def take(self, rates: Sequence[float]) -> None:
        pass


def test_the_loss_of_every_window(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    trial = AsItIs(model, "model.layers", [{"input_ids": batch} for batch in batches])
    assert trial.tokens == [15] * 6
    for window, row in enumerate(torch.cat(batches)):
        alone = measure(model, [{"input_ids": row[None]}], "x").perplexity
        assert trial.loss([0.5] * 3, window) == pytest.approx(math.log(alone), rel=1e-5)


def test_padding_is_left_out_and_windows_that_predict_nothing(model: PreTrainedModel) -> None:
    ids = torch.randint(1, 64, (3, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    mask[2, 1:] = 0
    trial = AsItIs(model, "model.layers", [{"input_ids": ids, "attention_mask": mask}])
    assert trial.tokens == [15, 9]
    alone = AsItIs(model, "model.layers", [{"input_ids": ids[1:2, :10]}])
    assert trial.loss([], 1) == pytest.approx(alone.loss([], 0), rel=1e-5)


def test_a_loss_that_is_no_number_is_infinite(batches: list[torch.Tensor]) -> None:
    model = small_model()
    model.get_output_embeddings().weight.data.fill_(math.nan)
    assert AsItIs(model, "model.layers", [{"input_ids": batches[0]}]).loss([], 0) == math.inf


def test_the_model_is_moved_and_comes_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, moves = small_model(), []
    monkeypatch.setattr(model, "to", lambda device: moves.append(str(device)))
    with model_on_device(model, torch.device("cpu")):
        assert moves == []
    with suppress(RuntimeError), model_on_device(model, torch.device("meta")):
        assert moves == ["meta"]
        raise RuntimeError
    assert moves == ["meta", "cpu"]


class Dense(AsItIs):
    """Rates above 0 scale the head."""

    def take(self, rates: Sequence[float]) -> None:
        self.model.base_model.norm.weight.data.fill_(1 - sum(rates) / 6)


@torch.no_grad()
def test_the_divergence_is_from_the_unpruned_model(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    trial = Dense(model, "model.layers", [{"input_ids": batch} for batch in batches])
    assert trial.divergence([0.0] * 3, 2) == pytest.approx(0, abs=1e-6)
    trial.take([0.0] * 3)
    ids = torch.cat(batches)[2:3]
    dense = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    trial.take([1.0] * 3)
    pruned = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    expected = float((dense.exp() * (dense - pruned)).sum(-1).mean())
    trial.take([0.0] * 3)
    assert trial.divergence([1.0] * 3, 2) == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    some = compared(ids.shape[1], None, 5)
    expected = float((dense.exp() * (dense - pruned)).sum(-1)[some].mean())
    assert trial.divergence([1.0] * 3, 2, tokens=5) == pytest.approx(expected, rel=1e-4)


def test_windows_that_are_not_compared_do_not_run(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    trial, passes = Dense(model, "model.layers", [{"input_ids": batch} for batch in batches]), [0]
    model.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    for rates, window, expected in ((0.0, 2, 2), (1.0, 2, 3), (1.0, 4, 5)):  # two passes for a new window
        trial.divergence([rates] * 3, window)
        assert passes == [expected]


def test_a_trial_of_blocks_alone() -> None:
    with pytest.raises(NotImplementedError, match="AsItIs has one rate per block"):
        AsItIs(small_model(), "model.layers", []).by_name()


class TwoBlocks(NamedTrial):
    names = (("experts.0.up", "down"), (), ("experts.1.up",))
    sizes = (4, 4, 8)

    def __init__(self) -> None: ...

    def take(self, rates: Sequence[float]) -> None: ...

    def split(self, rates: Sequence[float]) -> list[float]:
        return list(rates)

    def bounds(self, lower: Sequence[float], upper: Sequence[float]) -> tuple[list[float], list[float]]:
        return list(lower), list(upper)


def test_the_linears_of_a_block_and_those_of_a_name_in_all_blocks_and_in_stretches_of_them() -> None:
    assert TwoBlocks().families() == [[(0, 1), (2,)], [(0, 2), (1,)], *[[(0,), (1,), (2,)]] * 2]
    many = TwoBlocks()
    many.names = [("up", "down")] * 16
    assert many.families()[2][:2] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert many.families()[3][:2] == [(0, 2), (1, 3)]
    assert [len(family) for family in many.families()] == [16, 2, 8, 16]
