"""N of M by hand, over random scores, and through the pipeline."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, OWL, AlphaPruning, LayerRedundancy, Plan, Uniform
from lit_prune.allocate.base import weighted_mean
from lit_prune.allocate.budget import Budget
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.masks.zeros import zeros
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune, score
from lit_prune.pruning import Magnitude, MixedNofM, NofM, Wanda
from lit_prune.recipe import Recipe


def test_the_largest_of_every_group_stay() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4, 8, 7, 6, 5], [9, 1, 8, 2, 0, 0, 3, 1]])
    kept = NofM(2, 4).keep(scores, 0.5, by_row=True)
    assert kept.int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0, 1, 1]]
    assert torch.equal(kept, NofM(2, 4).keep(scores, 0.5, by_row=False))
    assert torch.equal(kept, MixedNofM(4).keep(scores, 0.5, by_row=True))
    assert MixedNofM(4).keep(scores, 0.75, by_row=True).int().tolist()[0] == [0, 0, 0, 1, 1, 0, 0, 0]


def test_a_group_that_has_less_left_keeps_that_and_gets_nothing_back() -> None:
    scores = torch.tensor([[-1.0, -1, -1, 0.5, -1, 3, 2, 1]])
    assert NofM(2, 4).keep(scores, 0.5, by_row=True).int().tolist() == [[0, 0, 0, 1, 0, 1, 1, 0]]


def test_wanda_compares_within_the_group() -> None:
    # |W| * norm = [[4, 3, 2, 1], [8, 2, 2.5, 1]] with norms [4, 1, 0.5, 1]
    weight = torch.tensor([[1.0, -3, 4, 1], [2, 2, -5, 1]])
    (pruned,) = Wanda(NofM(1, 2)).prune([weight], InputStatistics(torch.tensor([4.0, 1, 0.5, 1])), 0.5)
    assert pruned.tolist() == [[1, 0, 4, 0], [2, 0, -5, 0]]
    assert Magnitude(NofM(1, 2)).prune([weight], InputStatistics(), 0.5)[0].tolist() == [[0, -3, 4, 0], [2, 0, -5, 0]]


@given(
    m=st.integers(2, 16),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
    data=st.data(),
)
def test_every_group_keeps_exactly_n(
    m: int, shape: tuple[int, int], seed: int, ties: bool, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m))
    scores = torch.rand(shape[0], shape[1] * m, generator=torch.Generator().manual_seed(seed))
    scores = scores.round(decimals=1) if ties else scores
    for pattern in (NofM(n, m), MixedNofM(m)):
        kept = pattern.keep(scores, 1 - n / m, by_row=True)
        groups = kept.view(*shape, m)
        assert (groups.sum(-1) == n).all()
        lowest_kept = scores.view(*shape, m).masked_fill(~groups, 2).amin(-1)
        highest_gone = scores.view(*shape, m).masked_fill(groups, -1).amax(-1)
        assert (lowest_kept >= highest_gone).all()


def test_rates_are_rounded_by_hand() -> None:
    # 2.4, 3.6 and 6 of 8: the second has the larger remainder
    assert MixedNofM(8).rates([0.3, 0.45, 0.75], [1, 1, 1]) == [2 / 8, 4 / 8, 6 / 8]
    # the first block three times as large: 1.2 + 0.6 are missing; the second gives 1, and 3 more are too many
    assert MixedNofM(8).rates([0.3, 0.45, 0.75], [3, 1, 1]) == [2 / 8, 4 / 8, 6 / 8]
    # the second block three times as large: 0.4 + 1.8 are missing; 3 for them miss less than none
    assert MixedNofM(8).rates([0.3, 0.45, 0.75], [1, 3, 1]) == [2 / 8, 4 / 8, 6 / 8]
    # the second block ten times as large: 0.4 + 1 are missing; 10 for them are too many, so that the first gives 1
    assert MixedNofM(8).rates([0.3, 0.3875], [1, 10]) == pytest.approx([3 / 8, 3 / 8])
    assert MixedNofM(4).rates([0.5, 0.25], [1, 1]) == [0.5, 0.25]
    assert MixedNofM(8).rates([1.0, 0.95], [1, 1]) == [1.0, 7 / 8]  # nothing is rounded up to losing all


@given(
    m=st.integers(2, 16),
    blocks=st.lists(st.tuples(st.floats(0, 0.99), st.integers(1, 10**9)), min_size=1, max_size=20),
    same=st.booleans(),
)
def test_rounded_rates_keep_to_grid_and_budget(m: int, blocks: list[tuple[float, int]], same: bool) -> None:
    low, high = MixedNofM(m).bounds(0.0, 0.99)
    rates, sizes = [min(rate, high) for rate, _ in blocks], [1000 if same else size for _, size in blocks]
    rounded = MixedNofM(m).rates(rates, sizes)
    assert all(rate * m == pytest.approx(round(rate * m)) for rate in rounded)
    assert all(low <= rate <= high for rate in rounded)
    assert all(abs(new - old) < 1 / m + 1e-6 for new, old in zip(rounded, rates, strict=True))
    missed = abs(weighted_mean(rounded, sizes) - weighted_mean(rates, sizes))
    assert missed <= max(sizes) / sum(sizes) / m / 2 + 1e-6


def test_bounds_are_brought_to_the_grid() -> None:
    assert MixedNofM(8).bounds(0.0, 0.99) == (0, 7 / 8)
    assert MixedNofM(8).bounds(0.3, 0.625) == (3 / 8, 5 / 8)
    with pytest.raises(InputError, match="must have a multiple of 1/8 between them .* got 0.3 and 0.35"):
        MixedNofM(8).bounds(0.3, 0.35)


@pytest.mark.parametrize("allocation", [DLP(), OWL(), AlphaPruning(), LayerRedundancy(), Uniform()], ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.55, 0.8])
def test_the_allocation_chooses_n(
    model: PreTrainedModel, batches: list[torch.Tensor], allocation: DLP, sparsity: float
) -> None:
    recipe = Recipe(Wanda(MixedNofM(8)), sparsity, allocation)
    scored = score(model, batches, recipe)
    pruned = prune(model, batches, recipe)
    assert scored.rates == pruned.rates == pruned.achieved
    assert scored.planned == pytest.approx(pruned.sparsity)
    assert abs(scored.planned - sparsity) <= 1 / 8 / 3 / 2 + 1e-6
    for block in find_blocks(model):
        for linear in block.linears.values():
            kept = (linear.weight_OI != 0).unflatten(1, (-1, 8)).sum(-1)
            assert (kept == round(8 * (1 - pruned.rates[block.index]))).all()


def test_a_later_cut_resurrects_nothing(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    prune(model, batches, Recipe(Magnitude(), 0.4, Uniform()))
    gone = [linear.weight_OI == 0 for block in find_blocks(model) for linear in block.linears.values()]
    second = prune(model, batches, Recipe(Wanda(NofM(2, 4)), 0.5, Uniform()))
    linears = [linear for block in find_blocks(model) for linear in block.linears.values()]
    assert all((linear.weight_OI[where] == 0).all() for linear, where in zip(linears, gone, strict=True))
    assert all(((linear.weight_OI != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all() for linear in linears)
    assert second.sparsity > 0.5  # groups that had lost three or four keep to that, and the report says so


def test_rising_n_of_8(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    first = prune(model, batches, Recipe(Wanda(MixedNofM(8)), 0.3, DLP()))
    second = prune(model, batches, Recipe(Wanda(MixedNofM(8)), 0.6, DLP()))
    assert all(later >= rate for rate, later in zip(first.rates, second.rates, strict=True))
    assert second.achieved == second.rates


@pytest.mark.parametrize("budget", ["linears", "parameters"])
def test_a_later_target_that_rounding_has_passed_takes_nothing_more(model: PreTrainedModel, budget: Budget) -> None:
    """0.44 is 10.56 of the 24 eighths of three blocks, and becomes 11, which is more than 0.45."""
    within, total = sum(block.size for block in find_blocks(model)), parameters(model)
    outside = zeros(model.parameters())[0]
    of = {share: share if budget == "linears" else (share * within + outside) / total for share in (0.44, 0.45, 0.4)}
    first = prune(model, [], Recipe(Magnitude(MixedNofM(8)), of[0.44], Uniform(), budget=budget))
    assert first.sparsity == pytest.approx(11 / 24)
    second = prune(model, [], Recipe(Magnitude(MixedNofM(8)), of[0.45], Uniform(), budget=budget))
    assert second.rates == first.rates
    assert second.target == pytest.approx(0.45)
    assert second.sparsity == first.sparsity
    with pytest.raises(InputError, match=r"`pruning.sparsity` must be (at least the current sparsity|between 0.4)"):
        prune(model, [], Recipe(Magnitude(MixedNofM(8)), of[0.4], Uniform(), budget=budget))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            Recipe(Wanda(NofM(2, 4))),
            r"`pruning.allocation` must be Uniform for the pattern NofM, which keeps 2 of 4 in every block, got DLP: "
            r"pass `--pruning.allocation Uniform`, or `--pruning.method.pattern MixedNofM`, where DLP decides",
        ),
        (
            Recipe(Wanda(NofM(2, 4)), 0.75, Uniform()),
            r"`pruning.sparsity` must be 0.5 of the linears .* got 0.75: pass `--pruning.sparsity 0.5`, or "
            r"`--pruning.method.pattern.n 1`",
        ),
        (Recipe(Wanda(NofM(2, 4)), 0.6, Uniform()), r"got 0.6: pass `--pruning.sparsity 0.5`\.$"),
        (Recipe(Wanda(NofM(2, 4)), 0.5, Uniform(), budget="parameters"), r"must be 0.5 of the linears .* got 0.54"),
        (
            Recipe(Magnitude(NofM(2, 5)), 0.6, Uniform()),
            r"`NofM.m` must divide the columns of every linear, got 5: self_attn.q_proj of block 0 has 32",
        ),
        (
            Recipe(Magnitude(MixedNofM(32)), 0.5),
            r"`MixedNofM.m` must divide .* got 32: mlp.down_proj of block 0 has 48; .* `pruning.ignore`",
        ),
        (Recipe(Magnitude(MixedNofM(8)), 0.9), r"`pruning.sparsity` must be between 0 and 0.875"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_does_not_fit_is_refused_before_work(model: PreTrainedModel, recipe: Recipe, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(model, [], recipe)
    assert zeros(linear.weight_OI for block in find_blocks(model) for linear in block.linears.values())[0] == 0


def test_linears_whose_columns_do_not_fit_may_be_left_out(model: PreTrainedModel) -> None:
    pruned = prune(model, [], Recipe(Magnitude(MixedNofM(32)), 0.5, Uniform(), ignore=["down_proj"]))
    assert pruned.achieved == [0.5] * 3


def test_a_plan_of_equal_rates_is_uniform(model: PreTrainedModel, tmp_path: object) -> None:
    path = f"{tmp_path}/plan.yaml"
    for rates, even in ([0.5, 0.5, 0.5], True), ([0.4, 0.5, 0.6], False):
        with open(path, "w") as file:
            file.writelines(f"{block}: {rate}\n" for block, rate in enumerate(rates))
        recipe = Recipe(Magnitude(NofM(2, 4)), 0.5, Plan(path))
        assert recipe.allocation.is_uniform() == even
        if even:
            assert prune(model, [], recipe).rates == [0.5] * 3
        else:
            with pytest.raises(InputError, match="must be Uniform .* got Plan"):
                recipe.check(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NofM(5, 4), "`NofM.n` must be between 1 and m, 4, the columns of a group that stay, got 5"),
        (lambda: NofM(0, 4), "`NofM.n` must be between 1 and m, 4, .* got 0"),
        (lambda: NofM(1, 1), "`NofM.m` must be at least 2, .* got 1"),
        (lambda: MixedNofM(1), "`MixedNofM.m` must be at least 2, .* got 1"),
        (
            lambda: NofM(2, 4).keep(torch.ones(1, 4), 0.3, by_row=True),
            r"`rate` must be 0.5 for NofM\(n=2, m=4\), got 0.3",
        ),
        (lambda: MixedNofM(8).keep(torch.ones(1, 8), 0.3, by_row=True), "`rate` must be a multiple of 1/8 .* got 0.3"),
    ],
)
def test_settings_out_of_range(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
