"""Copy: its data types, what it shares with the student, and its way through a checkpoint."""

from typing import Any

import pytest
import torch

from lit_prune.allocate import Uniform
from lit_prune.distill import Copy, SparseDelta, Student
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA
from tests.conftest import small_model
from tests.distill.cases import IDS, STUDENTS, kept, says, taught


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_four_bits_of_matrices_that_are_no_linears(family: str) -> None:
    student, model = Student(Recipe(Magnitude(), 0.5, Uniform()), LoRA()), small_model(family)
    dense = model(IDS).logits.detach().flatten(0, 1).log_softmax(-1)
    teaching = kept(Copy("nf4"), model, student)
    taught(model, student, steps=1)
    assert 0 < (says(teaching, model) - dense).abs().max() < 0.5


def test_what_is_shared_is_the_students_and_stays_trainable_by_others() -> None:
    model = small_model()
    for teacher in (Copy(), SparseDelta()):
        kept(teacher, model, STUDENTS["LoRA"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    twin = kept(Copy(), model, STUDENTS["LoRA"]).model  # type: ignore[attr-defined]
    assert twin.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert twin.model.layers[0].mlp.up_proj.weight is not model.model.layers[0].mlp.up_proj.weight
    assert not twin.model.layers[0].mlp.up_proj.weight.requires_grad
    assert not twin.training


def test_a_student_of_two_bytes_is_copied_as_it_is() -> None:
    model = small_model().bfloat16()
    dense = model(IDS).logits.detach().flatten(0, 1)
    for store in ("same", "bfloat16"):
        teaching = kept(Copy(store), model, STUDENTS["LoRA"])
        assert teaching.output({"input_ids": IDS}).logits_NV.dtype == torch.bfloat16  # type: ignore[attr-defined]
        assert torch.equal(teaching.output({"input_ids": IDS}).logits_NV, dense)  # type: ignore[attr-defined]


@pytest.mark.parametrize("store", ["same", "bfloat16", "nf4"])
@pytest.mark.parametrize("name", ["LoRA", "FullFineTuning"])
def test_a_copy_comes_back_from_its_weights_to_the_bit(store: Any, name: str) -> None:
    model, other = small_model(), small_model()
    first = kept(Copy(store), model, STUDENTS[name])
    for parameter in other.parameters():
        if parameter.ndim == 2 and parameter is not other.model.embed_tokens.weight:
            parameter.data.mul_(2)
    again = kept(Copy(store), other, STUDENTS[name], weights=first.weights())
    ids = {"input_ids": IDS}
    assert torch.equal(again.output(ids).logits_NV, first.output(ids).logits_NV)  # type: ignore[attr-defined]


@pytest.mark.parametrize("store", ["bfloat16", "nf4"])
def test_no_second_model_in_full_precision_is_made_on_the_way(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self.numel()) or self)
    model = small_model()
    teaching: Any = kept(Copy(store), model, STUDENTS["FullFineTuning"])
    assert copied == []
    assert not {id(p) for p in teaching.model.parameters()} & {id(p) for p in model.parameters()}
    assert teaching.copied.keys() & teaching.lazy_weights.keys() == set()
