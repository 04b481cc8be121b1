"""Names that do not exist are answered with near misses and the choices."""

import pytest

from lit_prune.errors import InputError, described, near_misses, unknown_choice


@pytest.mark.parametrize(
    ("word", "expected"),
    [("wnda", ["Wanda"]), ("MAGNITUDE", ["Magnitude"]), ("sparse_gpt", ["SparseGPT"]), ("zzz", [])],
)
def test_near_misses_ignore_case(word: str, expected: list[str]) -> None:
    assert near_misses(word, ["Magnitude", "SparseGPT", "Wanda"]) == expected


def test_near_misses_come_best_first_and_no_more_than_asked_for() -> None:
    assert near_misses("nf4", ["nf44", "nf5", "nf4", "int8"], count=2) == ["nf4", "nf44"]


def test_an_unknown_choice_lists_them_in_order() -> None:
    error = unknown_choice("QLoRA.quantization", "nf3", ["nf4", "int8"])
    assert isinstance(error, InputError)
    assert str(error) == "`QLoRA.quantization` must be one of int8, nf4, got 'nf3'. Did you mean nf4?"
    assert str(unknown_choice("a", "zzz", ["nf4"])) == "`a` must be one of nf4, got 'zzz'."


def test_classes_and_names_in_the_place_of_objects() -> None:
    assert described(InputError) == "the class InputError"
    assert described("Wanda") == "'Wanda'"
