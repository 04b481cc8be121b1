"""LayerRedundancy by hand."""

import pytest

from lit_prune.allocate import LayerRedundancy
from lit_prune.allocate.base import weighted_mean
from lit_prune.errors import InputError
from tests.allocate.blocks import rates


def test_layer_redundancy_by_hand() -> None:
    # r = [0, 0.5, 1], mean 0.5: base + (s - base) * r / mean
    assert rates(LayerRedundancy(base=0.2), [0.8, 0.9, 1.0], 0.5) == pytest.approx([0.2, 0.5, 0.8])
    assert rates(LayerRedundancy(), [0.8, 0.9, 1.0], 0.5) == pytest.approx([0.25, 0.5, 0.75])
    assert rates(LayerRedundancy(base=0.5), [0.8, 0.9, 1.0], 0.5) == pytest.approx([0.5] * 3)


def test_layer_redundancy_never_falls_below_its_base() -> None:
    found = rates(LayerRedundancy(base=0.7), [0.1, 0.99, 1.0], 0.9)
    assert min(found) >= 0.7
    assert weighted_mean(found, [1, 1, 1]) == pytest.approx(0.9, abs=1e-6)


def test_layer_redundancy_base_above_the_sparsity_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"`LayerRedundancy.base` must be at most the mean sparsity of the blocks, 0.3, got"
    ):
        LayerRedundancy(base=0.4).check([1, 1], 0.3, [0, 0], 0.99)
