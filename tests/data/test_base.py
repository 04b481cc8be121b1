"""Sizes of windows by part, and rows as one stream."""

import torch

from lit_prune.data.base import WindowSizes, concatenated


def test_training_and_validation_have_sizes_of_their_own() -> None:
    sizes = WindowSizes(train=8, val=4, limit=3)
    assert [(sizes.tokens(part), sizes.count(part)) for part in ("train", "val", "test")] == [(8, None), (4, 3), (4, 3)]


def test_rows_one_after_the_other() -> None:
    stream = concatenated([[1, 2], [], [3]])
    assert stream.tolist() == [1, 2, 3]
    assert stream.dtype == torch.int32
