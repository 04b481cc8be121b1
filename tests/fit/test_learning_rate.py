import math

import pytest
import torch

from lit_prune.fit.learning_rate import share_of_peak, warm_up_and_cosine, warm_up_steps


@pytest.mark.parametrize(("until_cut", "steps"), [(5000, 10), (100, 10), (40, 4), (20, 2), (19, 1), (8, 1), (1, 1)])
def test_warm_up_is_a_tenth_of_a_short_stretch(until_cut: int, steps: int) -> None:
    assert warm_up_steps(until_cut) == steps


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (2, [0.5, 1, 0.55, 0.1]),
        (1, [1, 0.775, 0.325, 0.1]),
        (0, [1, 0.775, 0.325, 0.1]),
        (8, [1 / 8, 1 / 4, 3 / 8, 1 / 2]),
    ],
)
def test_the_first_step_is_made_and_the_last_has_the_least_rate(warmup: int, expected: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule, rates = warm_up_and_cosine(optimizer, warmup=warmup, steps=4, least=0.1), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2 * share for share in expected])


def test_a_step_beyond_the_last_keeps_the_least_rate() -> None:
    for least in (0.1, 0.0):
        for step in (3, 9):
            assert share_of_peak(step, warmup=2, steps=4, least=least) == least


def test_without_a_known_end_the_rate_stays_at_its_peak() -> None:
    assert warm_up_steps(math.inf) == 10
    assert [share_of_peak(step, warmup=2, steps=math.inf, least=0.1) for step in (0, 1, 10**6)] == [0.5, 1, 1]
