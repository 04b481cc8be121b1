"""The papers' formulas by hand, and what every allocation must do; a new one is tested without being named."""

import math
import random
from pathlib import Path

import pytest
import torch

from lit_prune.allocate import DLP, Allocation, LayerRedundancy, Plan, Uniform, allocate
from lit_prune.allocate.base import weighted_mean
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.errors import InputError

LEAVES = [leaf for leaf in Allocation.__subclasses__() if leaf.__module__.startswith("lit_prune.") and leaf is not Plan]


def rates(allocation: Allocation, scores: list[float], sparsity: float, **bounds: object) -> list[float]:
    return allocate(allocation, scores, sparsity, sizes=[1] * len(scores), **bounds)  # type: ignore[arg-type]


def test_dlp_score_is_the_median_over_all_linears_together() -> None:
    # A = [[1, 4, 9]] and [[2, 6]]: the median of 1, 2, 4, 6, 9 is 4
    weights = {"a": torch.tensor([[1.0, -2.0, 3.0]]), "b": torch.tensor([[-2.0, 3.0]])}
    observed = BlockStatistics({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 2.0])})
    assert DLP().score(weights, observed) == 4
    assert DLP(statistic="mean").score(weights, observed) == pytest.approx(22 / 5)
    assert DLP(statistic="max").score(weights, observed) == 9
    assert DLP(statistic="sum").score(weights, observed) == 22
    assert DLP(statistic="var").score(weights, observed) == pytest.approx(10.3)
    assert DLP(statistic="std").score(weights, observed) == pytest.approx(10.3**0.5)


def test_dlp_score_leaves_removed_weights_out() -> None:
    weights = {"a": torch.tensor([[0.0, 0.0, 0.0, 5.0, 7.0, 9.0]])}
    assert DLP().score(weights, BlockStatistics({"a": torch.ones(6)})) == 7


def test_dlp_rates_by_hand() -> None:
    # I = [7/8, 6/8, 3/8]; min-max = [1, 3/4, 0]; keep = [0.3, 0.225, 0] + c with mean 0.5
    c = 0.5 - 0.525 / 3
    assert rates(DLP(alpha=0.15), [1, 2, 5], 0.5) == pytest.approx([1 - 0.3 - c, 1 - 0.225 - c, 1 - c])


def test_dlp_larger_score_gives_more_and_the_range_is_twice_alpha() -> None:
    found = rates(DLP(alpha=0.1), [3, 1, 2], 0.4)
    assert found[1] < found[2] < found[0]
    assert max(found) - min(found) == pytest.approx(0.2)


def test_dlp_of_nothing_but_zeros_is_an_error() -> None:
    with pytest.raises(InputError, match="score of 0 in every block"):
        rates(DLP(), [0, 0, 0], 0.5)


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
        InputError, match=r"`LayerRedundancy.base` must be at most what `pruning.sparsity` comes to, 0.3, got"
    ):
        LayerRedundancy(base=0.4).check([1, 1], 0.3, [0, 0], 0.99)


def test_uniform() -> None:
    assert rates(Uniform(), [1, 1, 1], 0.37) == pytest.approx([0.37] * 3)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("seed", range(20))
def test_contract(leaf: type[Allocation], seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 12)
    scores = [draw.uniform(0.01, 1) ** draw.choice([1, 5]) for _ in range(count)]
    sizes = [draw.randint(1, 1000) for _ in range(count)]
    least, most = draw.uniform(0, 0.2), draw.uniform(0.9, 0.99)
    for sparsity in (least + 0.01, 0.5, 0.7, 0.89):
        found = allocate(leaf(), scores, sparsity, sizes=sizes, min_rate=least, max_rate=most)
        assert weighted_mean(found, sizes) == pytest.approx(sparsity, abs=1e-6)
        assert all(least - 1e-9 <= rate <= most + 1e-9 for rate in found)
        assert found == allocate(leaf(), scores, sparsity, sizes=sizes, min_rate=least, max_rate=most)


@pytest.mark.parametrize("leaf", LEAVES)
def test_equal_scores_and_a_single_block_give_the_uniform_rate(leaf: type[Allocation]) -> None:
    assert rates(leaf(), [0.4] * 5, 0.3) == pytest.approx([0.3] * 5)
    assert rates(leaf(), [0.4], 0.3) == pytest.approx([0.3])


def test_a_later_cut_never_gives_back() -> None:
    found = rates(DLP(), [1, 2, 5], 0.6, present=[0.7, 0.2, 0.2])
    assert found[0] >= 0.7
    assert weighted_mean(found, [1] * 3) == pytest.approx(0.6, abs=1e-6)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(InputError, match=r"`pruning.sparsity` must be between 0 and 0.4.*got 0.5"):
        rates(Uniform(), [1, 1], 0.5, max_rate=0.4)
    with pytest.raises(InputError, match=r"between 0.6 and 0.99"):
        rates(Uniform(), [1, 1], 0.5, present=[0.9, 0.3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DLP(alpha=0.6), r"`DLP.alpha` must be in \[0, 0.5\], got 0.6"),
        (lambda: LayerRedundancy(base=1.0), r"`LayerRedundancy.base` must be in \[0, 1\) or null, got 1.0"),
    ],
)
def test_settings_out_of_range(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


def plan(tmp_path: Path, text: str) -> Plan:
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    return Plan(str(tmp_path / "plan.yaml"))


def test_plan_is_followed(tmp_path: Path) -> None:
    assert rates(plan(tmp_path, "0: 0.2\n1: 0.8\n"), [1, 1], 0.5) == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: 0.2\n1: 0.8\n2: 0.5\n", "the model has blocks 0 to 1, .* names 2"),
        ("0: 0.5\n", "has none for block 1"),
        ("0: 0.05\n1: 0.95\n", r"the rate of block 1 must be between 0.1 .* and 0.9 .*got 0.95"),
        ("0: 0.95\n1: 0.05\n", r"the rate of block 0 must be between 0 .* and 0.9 .*got 0.95"),
        (
            "0: 0.2\n1: 0.6\n",
            r"mean of 0.4, `pruning.sparsity` comes to 0.5; edit the plan, or pass `--pruning.sparsity 0.4 --prun",
        ),
    ],
)
def test_plan_that_does_not_fit(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(tmp_path, text).check([10, 10], 0.5, [0, 0.1], 0.9)


def test_plan_mean_is_weighted_by_size(tmp_path: Path) -> None:
    plan(tmp_path, "0: 0.2\n1: 0.6\n").check([10, 30], 0.5, [0, 0], 0.99)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must map blocks to rates"),
        ("- 1\n", "must map blocks to rates"),
        ("a: 0.5\n", "blocks must be whole numbers, got 'a'"),
        ("0: 1.5\n", r"rate of block 0 must be in \[0, 1\], got 1.5"),
        ("0: [\n", "must be YAML"),
    ],
)
def test_plan_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(tmp_path, text)


def test_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`Plan.path` must be a file, got .*lit-prune score"):
        Plan(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_score_is_one_finite_number_and_touches_nothing(leaf: type[Allocation], share: float) -> None:
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(12, 16, generator=random, dtype=torch.bfloat16) for name in ("a", "b")}
    for weight in weights.values():
        weight[torch.rand(12, 16, generator=random) < share] = 0
    before = {name: weight.clone() for name, weight in weights.items()}
    observed = BlockStatistics({name: torch.rand(16, generator=random) for name in weights}, cosine=0.9)
    found = leaf().score(weights, observed)
    assert isinstance(found, float)
    assert math.isfinite(found)
    assert found == leaf().score(weights, observed)
    assert all(torch.equal(before[name], weight) for name, weight in weights.items())
