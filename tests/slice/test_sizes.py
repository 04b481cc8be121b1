import random

import pytest

from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.remote_code.modeling_sliced import take_shape
from lit_prune.slice import rates_from_sizes, sizes_from_rates, sliced_parameters
from lit_prune.slice.sizes import check_multiple
from tests.conftest import small_model


def test_by_hand() -> None:
    assert sizes_from_rates([0.3, 0.4], 32, 8) == [24, 16]
    assert sizes_from_rates([0.0, 0.5], 32, 8) == [32, 16]
    assert sizes_from_rates([0.25, 0.25, 0.25], 576, 8) == [432, 432, 432]
    assert rates_from_sizes([24, 16], 32) == [0.25, 0.5]


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_the_mean_is_as_near_as_a_multiple_allows(multiple: int) -> None:
    generator = random.Random(multiple)
    for _ in range(200):
        blocks, width = generator.randint(1, 40), multiple * generator.randint(2, 40)
        rates = [generator.uniform(0, 1 - multiple / width) for _ in range(blocks)]
        sizes = sizes_from_rates(rates, width, multiple)
        assert all(size % multiple == 0 and multiple <= size <= width for size in sizes)
        assert abs(sum(sizes) - sum((1 - rate) * width for rate in rates)) <= multiple / 2 + 1e-6
        assert all(abs(size - (1 - rate) * width) <= multiple for size, rate in zip(sizes, rates, strict=True))
        assert sizes_from_rates(rates_from_sizes(sizes, width), width, multiple) == sizes


def test_a_multiple_that_does_not_divide_the_width() -> None:
    with pytest.raises(
        InputError,
        match=r"`Slicing.multiple` must divide the model's width of 576 and be less, got 7. The nearest divis",
    ):
        check_multiple(7, 576)
    with pytest.raises(
        InputError, match=r"must divide the model's width of 32 and be less, got 64. The nearest divisors are 4, 8, 16"
    ):
        check_multiple(64, 32)
    with pytest.raises(InputError, match=r"and be less, got 32. The nearest divisors are 4, 8, 16"):
        check_multiple(32, 32)
    check_multiple(8, 576)


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_parameters_are_told_without_a_model(family: str) -> None:
    model = small_model(family)
    sizes = [24, 16, 32, 32]
    told = sliced_parameters(model.config, sizes)
    assert not hasattr(model.config, "slice_sizes")
    take_shape(model, sizes)
    assert parameters(model) == told
