"""The settings of a distillation and of its teachers."""

from typing import Any

import pytest

from lit_prune.distill import Copy, Distillation, TopK
from lit_prune.errors import InputError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(temperature=0), "`pruning.distillation.temperature` must be above 0, got 0"),
        (
            lambda: Distillation(weight=0),
            r"`pruning.distillation.weight` must be in \(0, 1\].*, got 0; to train without",
        ),
        (lambda: Distillation(weight=1.5), r"`pruning.distillation.weight` must be in \(0, 1\].*, got 1.5"),
        (lambda: TopK(0), "`TopK.k` must be at least 1, .*got 0"),
        (lambda: Copy("int3"), "`Copy.store` must be one of same, bfloat16, nf4, got 'int3'"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
