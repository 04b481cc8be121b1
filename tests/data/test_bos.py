"""Windows that begin with BOS, and those that do not."""

from pathlib import Path

import pytest

from lit_prune.data.bos import Bos, adds_bos
from lit_prune.errors import InputError
from lit_prune.models.load import load_tokenizer
from tests.data.tokenizers import with_bos


def test_a_tokenizer_that_adds_none_leaves_windows_as_they_are() -> None:
    tokenizer = load_tokenizer("embedded")
    assert not adds_bos(tokenizer)
    for bos in (None, False):
        assert Bos.of(tokenizer, bos) == Bos(None, "")
    assert Bos(None, "").begin([5, 6]) == [5, 6]


def test_a_tokenizer_that_adds_one(tmp_path: Path) -> None:
    folder, bos = with_bos(tmp_path)
    tokenizer = load_tokenizer(folder)
    assert adds_bos(tokenizer)
    for given in (None, True):
        assert Bos.of(tokenizer, given) == Bos(bos, ", BOS in every window")
    assert Bos.of(tokenizer, False) == Bos(None, ", BOS once a text")


def test_one_bos_at_the_start() -> None:
    begin = Bos(1, "").begin
    assert begin([5, 1, 6]) == [1, 5, 1, 6]
    assert begin([1, 5]) == begin([1, 1, 5]) == [1, 5]
    assert begin([]) == begin([1]) == [1]


def test_a_tokenizer_without_bos() -> None:
    tokenizer = load_tokenizer("embedded")
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="`data.bos` must be null or false for the tokenizer of .*, which has no BOS"):
        Bos.of(tokenizer, True)
