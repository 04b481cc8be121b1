"""Weights that a student shares with its teacher, and states that cannot be restored."""

from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

from lit_prune.allocate import Uniform
from lit_prune.distill import Student, TeacherOutput, TeacherState
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA
from lit_prune.slice import Slicing


@pytest.mark.parametrize(
    ("student", "keeps"),
    [
        (Student(Recipe(), LoRA()), True),
        (Student(Recipe(), MaskedLoRA(), (5,)), True),
        (Student(Recipe(), MaskedLoRA(), (0, 3)), False),  # a merge between the cuts changes the weights
        (Student(Recipe(), FullFineTuning()), False),
        (Student(Recipe(), QLoRA()), False),
        (Student(Recipe(), None), False),
        (Student(Recipe(Slicing(), 0.25, Uniform()), LoRA()), False),
    ],
)
def test_uncut_weights_stay_under_an_adapter_and_a_single_cut_by_masks(student: Student, keeps: bool) -> None:
    assert student.keeps_uncut_weights is keeps


def test_a_state_without_weights_says_so() -> None:
    class Silent(TeacherState):
        def output(self, inputs: Mapping[str, Tensor]) -> TeacherOutput:
            raise AssertionError

        def size_bytes(self) -> int:
            return 0

    state: Any = Silent()
    with pytest.raises(NotImplementedError, match="Silent cannot be restored from weights"):
        state.weights()
