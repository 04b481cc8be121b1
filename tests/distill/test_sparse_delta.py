"""SparseDelta: the dense model of every family, and the students that it does not suit."""

import pytest
import torch

from lit_prune.allocate import Uniform
from lit_prune.distill import SparseDelta, Student
from lit_prune.errors import InputError
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA
from tests.conftest import FAMILIES, small_model
from tests.distill.cases import IDS, STUDENTS, kept, says, taught


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(family: str) -> None:
    student, model = Student(Recipe(Magnitude(), 0.5, Uniform()), LoRA()), small_model(family)
    dense = model(IDS).logits.detach().flatten(0, 1).log_softmax(-1)
    teaching = kept(SparseDelta(), model, student)
    taught(model, student, steps=1)
    assert torch.equal(says(teaching, model), dense)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SparseGPT", "SparseGPT changes weights that it does not remove"),
        ("slices", "Slicing changes weights that it does not remove"),
        ("QLoRA", r"`pruning.recovery` QLoRA\(.*\) does not leave the weights as they are"),
        ("FullFineTuning", r"`pruning.recovery` FullFineTuning\(\) does not leave the weights as they are"),
        ("gradual", "it supports a single cut, at step 0, and there are cuts at 0, 3"),
    ],
)
def test_removed_weights_that_could_not_be_put_back(name: str, why: str) -> None:
    with pytest.raises(
        InputError, match=f"`pruning.distillation.teacher` must not be SparseDelta here, {why}.*: use Copy"
    ):
        SparseDelta().check(STUDENTS[name])
