"""The settings of a reconstruction, and what they refuse."""

import pytest

from lit_prune.errors import InputError
from lit_prune.reconstruct import Reconstruct


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "`pruning.reconstruction.epochs` must be at least 1, got 0"),
        ({"lr": 0.0}, "`pruning.reconstruction.lr` must be above 0, and finite, got 0.0"),
        ({"lr": float("nan")}, "`pruning.reconstruction.lr` must be above 0, and finite, got nan"),
        ({"lr": float("inf")}, "`pruning.reconstruction.lr` must be above 0, and finite, got inf"),
        ({"max_norm": -1.0}, "`pruning.reconstruction.max_norm` must be above 0"),
        ({"weight_decay": -0.1}, "`pruning.reconstruction.weight_decay` must be at least 0, got -0.1"),
        ({"targets_from": "both"}, "`pruning.reconstruction.targets_from` must be one of dense, pruned, got 'both'"),
    ],
)
def test_refused_in_one_line(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Reconstruct(**wrong)  # type: ignore[arg-type]
