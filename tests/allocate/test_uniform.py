"""Uniform: one rate for all blocks."""

import pytest

from lit_prune.allocate import Uniform
from tests.allocate.blocks import rates


def test_uniform() -> None:
    assert rates(Uniform(), [1, 1, 1], 0.37) == pytest.approx([0.37] * 3)
