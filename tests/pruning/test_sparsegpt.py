"""Against the paper's algorithm done slowly: one column at a time, in float64, with an inverse made anew for each."""

import weakref

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, Uniform
from lit_prune.calibration.statistics import GRAM, BlockStatistics, InputStatistics
from lit_prune.errors import InputError
from lit_prune.masks.zeros import zeros
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.pruning import MixedNofM, NofM, Pattern, SparseGPT, Wanda, mask_method, sparsegpt
from lit_prune.pruning.sparsegpt import inverse_factor, removals_of_spans
from lit_prune.recipe import Recipe
from tests.conftest import inputs_by_linear, small_model


def slowly(
    weight_OI: torch.Tensor, x_PI: torch.Tensor, counts: list[int], span: int, damping: float = 0.01
) -> torch.Tensor:
    """The paper, section 3.2 and 3.3: H^-1 of what is on the right of each column, errors pushed at once."""
    w_OI, x_PI = weight_OI.double().clone(), x_PI.double()
    hessian_II = 2 * x_PI.T @ x_PI / len(x_PI)
    hessian_II += damping * hessian_II.diagonal().mean() * torch.eye(len(hessian_II))
    inverses = [torch.linalg.inv(hessian_II[column:, column:]) for column in range(len(hessian_II))]
    for block, begin in enumerate(range(0, w_OI.shape[1], span)):
        columns = range(begin, min(begin + span, w_OI.shape[1]))
        cost_OS = torch.stack([w_OI[:, column] ** 2 / inverses[column][0, 0] for column in columns], 1)
        keep_OS = torch.ones_like(cost_OS, dtype=torch.bool)
        keep_OS.view(-1)[cost_OS.flatten().argsort()[: counts[block]]] = False
        for column in columns:
            error_O = torch.where(keep_OS[:, column - begin], 0, w_OI[:, column]) / inverses[column][0, 0]
            w_OI[:, column:] -= error_O[:, None] * inverses[column][0]
            w_OI[:, column] = torch.where(keep_OS[:, column - begin], w_OI[:, column], 0)
    return w_OI


def slowly_n_of_m(weight_OI: torch.Tensor, x_PI: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The paper, section 3.4: a span of M columns, in every row by itself, loses M - N."""
    counts = [m - n] * (weight_OI.shape[1] // m)
    return torch.cat([slowly(row_I[None], x_PI, counts, m) for row_I in weight_OI])


def data(rows: int, columns: int, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(rows + columns)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=random)
    return torch.randn(rows, columns, generator=random), torch.randn(tokens, columns, generator=random) @ mixing


def seen_by(x_PI: torch.Tensor) -> InputStatistics:
    return InputStatistics(gram_II=x_PI.T @ x_PI / len(x_PI))


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.7])
@pytest.mark.parametrize(("columns", "span"), [(24, 128), (24, 8), (20, 8), (260, 128)])
def test_it_is_the_paper(columns: int, span: int, rate: float) -> None:
    weight_OI, x_PI = data(12, columns, tokens=2 * columns)
    sizes = [12 * min(span, columns - begin) for begin in range(0, columns, span)]
    counts = removals_of_spans([0] * len(sizes), sizes, round(12 * columns * rate))
    expected = slowly(weight_OI, x_PI, counts, span)
    (pruned,) = SparseGPT(span=span).prune([weight_OI], seen_by(x_PI), rate)
    assert torch.equal(pruned == 0, expected == 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-3)


def test_linears_of_one_input_are_solved_together_and_decided_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    (one, x_PI), (other, _) = data(12, 24), data(7, 24)
    calls = []
    factor = sparsegpt.inverse_factor
    monkeypatch.setattr(sparsegpt, "inverse_factor", lambda *args: calls.append(args) or factor(*args))
    together = SparseGPT(span=8).prune([one, other * 100], seen_by(x_PI), 0.5)  # one threshold would spare the second
    assert len(calls) == 1
    for weight_OI, pruned in zip((one, other * 100), together, strict=True):
        expected = slowly(weight_OI, x_PI, [len(weight_OI) * 4] * 3, 8)
        assert torch.equal(pruned == 0, expected == 0)
        torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-3)


def test_by_hand() -> None:
    seen = seen_by(torch.tensor([[3.0, 4.0], [3.0, -4.0]]))  # H = diag(18, 32)
    assert SparseGPT().prune([torch.tensor([[4.0, 3.5]])], seen, 0.5)[0].tolist() == [[0, 3.5]]


def test_what_stays_makes_up_for_what_goes() -> None:
    weight_OI, x_PI = data(16, 32)
    (pruned,) = SparseGPT().prune([weight_OI], seen_by(x_PI), 0.5)
    masked = torch.where(pruned == 0, 0, weight_OI)
    assert (x_PI @ (pruned - weight_OI).T).norm() < 0.9 * (x_PI @ (masked - weight_OI).T).norm()


def test_what_is_gone_stays_gone_though_errors_reach_it() -> None:
    weight_OI, x_PI = data(12, 40)
    weight_OI[:, 20:] *= torch.rand(12, 20, generator=torch.Generator().manual_seed(0)) > 0.6
    gone_OI = weight_OI == 0
    (pruned,) = SparseGPT(span=16).prune([weight_OI], seen_by(x_PI), 0.5)
    assert (pruned[gone_OI] == 0).all()
    assert (pruned == 0).sum() == 240


def test_a_dead_column_goes_first() -> None:
    weight_OI, x_PI = data(10, 24)
    x_PI[:, [3, 17]] = 0
    (pruned,) = SparseGPT(span=8).prune([weight_OI], seen_by(x_PI), 0.25)
    assert not pruned[:, [3, 17]].any()
    assert (pruned == 0).sum() == 60
    assert pruned.isfinite().all()


def test_dead_columns_side_by_side_go_before_a_span_takes_its_share() -> None:
    weight_OI, x_PI = data(10, 24)
    x_PI[:, :6] = 0
    (pruned,) = SparseGPT(span=8).prune([weight_OI], seen_by(x_PI), 0.25)
    assert not pruned[:, :6].any()
    assert torch.equal(pruned[:, 6:], weight_OI[:, 6:])


def test_more_dead_columns_than_may_go_lose_their_smallest_weights() -> None:
    weight_OI, x_PI = data(10, 24)
    x_PI[:, 8:] = 0
    (pruned,) = SparseGPT().prune([weight_OI], seen_by(x_PI), 0.25)
    assert torch.equal(pruned[:, :8], weight_OI[:, :8])
    assert pruned[:, 8:].abs().sort().values.count_nonzero() == 100
    assert weight_OI[:, 8:][pruned[:, 8:] == 0].abs().max() < pruned[:, 8:][pruned[:, 8:] != 0].abs().min()


def test_an_expert_that_no_token_reached_loses_its_smallest_weights() -> None:
    weight_OI, _ = data(4, 6)
    (pruned,) = SparseGPT().prune([weight_OI], InputStatistics(gram_II=torch.zeros(6, 6)), 0.5)
    assert torch.equal(pruned, torch.where(weight_OI.abs() > weight_OI.abs().median(), weight_OI, 0))


def test_shares_by_hand() -> None:
    assert removals_of_spans([0, 4, 0], [8, 8, 4], 12) == [4, 6, 2]
    assert removals_of_spans([0, 0, 0], [7, 7, 7], 10) == [3, 4, 3]
    assert removals_of_spans([8, 0], [8, 8], 8) == [8, 0]
    assert removals_of_spans([8], [8], 8) == [8]


def test_inverse_factor_by_hand() -> None:
    assert inverse_factor(torch.diag(torch.tensor([4.0, 16.0])), 1e-9).tolist() == [[0.5, 0], [0, 0.25]]
    factor_II = inverse_factor(torch.tensor([[4.0, 2.0], [2.0, 3.0]]), 1e-9)
    assert factor_II[1, 0] == 0
    torch.testing.assert_close(factor_II.T @ factor_II, torch.tensor([[3.0, -2.0], [-2.0, 4.0]]) / 8)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(sparsegpt, "log", lines.append)
    return lines


def test_damping_is_raised_until_it_helps_and_says_so(said: list[str]) -> None:
    factor_II = inverse_factor(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 0.01)  # eigenvalues 4 and -2
    assert said[-1] == "SparseGPT: X X^T of 2 inputs cannot be factorised, damping raised to 10"
    torch.testing.assert_close(factor_II.T @ factor_II, torch.linalg.inv(torch.tensor([[11.0, 3.0], [3.0, 11.0]])))


def test_a_singular_gram_matrix_is_no_trouble(said: list[str]) -> None:
    weight_OI, x_PI = data(8, 40, tokens=3)
    (pruned,) = SparseGPT().prune([weight_OI], seen_by(x_PI), 0.5)
    assert pruned.isfinite().all()
    assert (pruned == 0).sum() == 160
    assert not said


def test_inputs_that_are_no_numbers(said: list[str]) -> None:
    with pytest.raises(InputError, match="must give linears finite inputs, got NaN.*`model.dtype` is too small"):
        SparseGPT().prune([torch.ones(2, 2)], InputStatistics(gram_II=torch.full((2, 2), torch.nan)), 0.5)


@pytest.mark.parametrize(("fields", "message"), [({"damping": 0.0}, "above 0, got 0.0"), ({"span": 0}, "at least 1")])
def test_settings_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=f"`SparseGPT.{next(iter(fields))}` must be {message}"):
        SparseGPT(**fields)  # type: ignore[arg-type]


GROUPS = pytest.mark.parametrize(
    ("pattern", "n", "m"),
    [(NofM(2, 4), 2, 4), (NofM(4, 8), 4, 8), (NofM(1, 2), 1, 2), (MixedNofM(8), 6, 8), (MixedNofM(8), 3, 8)],
    ids=str,
)


@GROUPS
@pytest.mark.parametrize(("columns", "span"), [(24, 128), (24, 8), (136, 128)])
def test_groups_are_the_paper_too(columns: int, span: int, pattern: Pattern, n: int, m: int) -> None:
    weight_OI, x_PI = data(5, columns, tokens=2 * columns)
    expected = slowly_n_of_m(weight_OI, x_PI, n, m)
    (pruned,) = SparseGPT(pattern, span=span).prune([weight_OI], seen_by(x_PI), 1 - n / m)
    assert torch.equal(pruned == 0, expected == 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-3)


@GROUPS
def test_every_group_of_every_linear_keeps_n_and_what_stays_makes_up(pattern: Pattern, n: int, m: int) -> None:
    (one, x_PI), (other, _) = data(16, 32), data(7, 32)
    for weight_OI, pruned in zip(
        (one, other), SparseGPT(pattern).prune([one, other], seen_by(x_PI), 1 - n / m), strict=True
    ):
        assert ((pruned != 0).unflatten(1, (-1, m)).sum(-1) == n).all()
        masked = torch.where(pruned == 0, 0, weight_OI)
        assert (x_PI @ (pruned - weight_OI).T).norm() < 0.9 * (x_PI @ (masked - weight_OI).T).norm()


def test_groups_lose_no_more_where_columns_are_dead_or_weights_are_gone() -> None:
    weight_OI, x_PI = data(6, 12)
    x_PI[:, [4, 5, 7]] = 0
    weight_OI[2, :2] = 0
    (pruned,) = SparseGPT(NofM(1, 2)).prune([weight_OI], seen_by(x_PI), 0.5)
    lost = (pruned == 0).view(6, 6, 2).sum(2)
    assert lost[2, 0] == 2
    assert lost.sum() == 37
    assert not pruned[:, 7].any()


@pytest.mark.parametrize(
    ("pattern", "span", "message"),
    [
        (
            NofM(3, 6),
            128,
            r"a multiple of 6, .* NofM\(n=3, m=6\) masks together, got 128; pass .*span 126`",
        ),
        (MixedNofM(8), 4, r"a multiple of 8, .* got 4; pass `--pruning.method.span 8`"),
    ],
    ids=str,
)
def test_groups_that_a_span_would_split_are_refused(pattern: Pattern, span: int, message: str) -> None:
    with pytest.raises(InputError, match=f"`SparseGPT.span` must be {message}"):
        SparseGPT(pattern, span=span)


def test_the_whole_model_behind_pruned_blocks(batches: list[torch.Tensor]) -> None:
    model = small_model()
    prune(model, batches, Recipe(SparseGPT(), 0.5, Uniform()))
    again = small_model()
    for block in find_blocks(again):
        given = inputs_by_linear(again, block, batches)
        for name, linear in block.linears.items():
            (pruned,) = SparseGPT().prune([linear.weight_OI], seen_by(given[name]), 0.5)
            found = find_blocks(model)[block.index].linears[name].weight_OI
            torch.testing.assert_close(found, pruned, rtol=1e-3, atol=1e-4)
        for name, linear in block.linears.items():
            linear.write(find_blocks(model)[block.index].linears[name].weight_OI)


@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_gram_matrices_of_one_block_at_a_time_unless_dense(
    model: PreTrainedModel, batches: list[torch.Tensor], propagate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[BlockStatistics] = []
    apply = SparseGPT.apply

    def spy(self: SparseGPT, *args: object, statistics: list[BlockStatistics], **kwargs: object) -> list[float]:
        kept.extend(statistics)
        return apply(self, *args, statistics=statistics, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(SparseGPT, "apply", spy)
    prune(model, batches, Recipe(SparseGPT(propagate=propagate), 0.5, DLP()))  # type: ignore[arg-type]
    assert [len(observed.grams) for observed in kept] == [7 if propagate == "dense" else 0] * 3


def test_statistics_are_gone_before_the_next_blocks_are_taken(
    model: PreTrainedModel, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    observe, alive = mask_method.observe, []

    def spy(*args: object, **kwargs: object) -> BlockStatistics:
        alive.append([ref for ref in refs if ref() is not None])
        observed = observe(*args, **kwargs)  # type: ignore[arg-type]
        refs.extend(weakref.ref(gram) for gram in observed.grams.values())
        return observed

    refs: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(mask_method, "observe", spy)
    prune(model, batches, Recipe(SparseGPT(), 0.5, Uniform()))
    assert len(refs) == 21
    assert alive == [[], [], []]


def test_after_another_method(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    prune(model, batches, Recipe(Wanda(), 0.4))
    gone = [linear.weight_OI == 0 for block in find_blocks(model) for linear in block.linears.values()]
    second = prune(model, batches, Recipe(SparseGPT(), 0.6, Uniform()))
    linears = [linear for block in find_blocks(model) for linear in block.linears.values()]
    assert all((linear.weight_OI[where] == 0).all() for linear, where in zip(linears, gone, strict=True))
    assert zeros(linear.weight_OI for linear in linears)[0] / sum(second.sizes) == pytest.approx(0.6, abs=1e-3)
    assert SparseGPT.needs == {GRAM}
