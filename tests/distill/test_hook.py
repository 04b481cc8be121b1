"""The loss of a distillation against the plain expression, and the calls of an LLM that it supports."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.distill import Copy, Distillation, DistillationHook
from lit_prune.errors import InputError
from lit_prune.pipeline import prune
from lit_prune.pruning import Wanda
from lit_prune.recipe import Recipe
from tests.conftest import small_model
from tests.distill.cases import IDS, STUDENTS, kept


def student_and_teacher(**fields: Any) -> tuple[PreTrainedModel, PreTrainedModel, DistillationHook]:
    model, dense = small_model(), small_model()
    distilled = DistillationHook(Distillation(**fields), kept(Copy(), model, STUDENTS["LoRA"]))
    prune(model, [IDS], Recipe(Wanda(), 0.7))
    distilled.register(model)
    return model, dense, distilled


def test_the_loss_and_its_gradient_are_the_mixture_over_the_positions_that_the_cross_entropy_counts() -> None:
    model, dense, distilled = student_and_teacher(temperature=2.0, weight=0.25)
    labels = IDS.clone()
    labels[0, :5] = labels[1, 9:] = -100
    loss = model(IDS, labels=labels).loss
    (found,) = torch.autograd.grad(loss, model.model.norm.weight)
    logits = model(IDS).logits
    counted = labels[:, 1:] != -100
    log_p = (logits[:, :-1][counted] / 2).log_softmax(-1)
    log_q = (dense(IDS).logits[:, :-1][counted] / 2).log_softmax(-1).detach()
    cross = torch.nn.functional.cross_entropy(logits[:, :-1][counted], labels[:, 1:][counted])
    divergence = 4 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected = 0.75 * cross + 0.25 * divergence
    (by_torch,) = torch.autograd.grad(expected, model.model.norm.weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, by_torch)
    torch.testing.assert_close(distilled.losses, {"cross_entropy": cross.detach(), "distillation": divergence.detach()})


def test_padding_is_the_same_as_its_absence() -> None:
    model, _, distilled = student_and_teacher(weight=1.0)
    short = model(IDS[:1, :10], labels=IDS[:1, :10]).loss
    padded, mask = IDS[:1].clone(), torch.ones_like(IDS[:1])
    mask[:, 10:] = padded[:, 10:] = 0
    labels = padded.masked_fill(mask == 0, -100)
    long = model(input_ids=padded, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(long, short, rtol=1e-4, atol=0)  # sums of another order over logits nearly alike
    torch.testing.assert_close(short, distilled.losses["distillation"], rtol=1e-4, atol=0)


def test_labels_that_are_shifted_already_and_a_count_of_ones_own() -> None:
    model, *_ = student_and_teacher(weight=1.0)
    mean = model(IDS, labels=IDS).loss
    shifted = torch.cat([IDS[:, 1:], torch.full((3, 1), -100)], 1)
    torch.testing.assert_close(model(IDS, labels=IDS, shift_labels=shifted).loss, mean)
    summed = model(IDS, labels=IDS, num_items_in_batch=torch.tensor(5)).loss
    torch.testing.assert_close(summed, mean * 45 / 5)


def test_only_a_loss_that_is_trained_on_is_another() -> None:
    model, dense, distilled = student_and_teacher(weight=1.0)
    model.train()
    with torch.no_grad():
        assert model(IDS, labels=IDS).loss > 3
    assert model(IDS).loss is None
    assert distilled.losses == {}
    assert model(IDS, labels=IDS).loss < 1
    assert dense(IDS, labels=IDS).loss > 3


@pytest.mark.parametrize("fields", [{"return_dict": False}, {"logits_to_keep": 4, "shift_labels": IDS[:, :4].clone()}])
def test_logits_that_cannot_be_seen(fields: dict[str, Any]) -> None:
    model, *_ = student_and_teacher()
    with pytest.raises(
        InputError, match="must see the logits of all positions, got others: .* `return_dict=False` and `logits_to"
    ):
        model(IDS, labels=IDS, **fields)
