"""Against the paper's algorithm as its formulas are written, with W transposed, in float64, one linear at a time."""

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, Uniform
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.errors import InputError
from lit_prune.masks.zeros import zeros
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.pruning import ADMM, MixedNofM, NofM, Pattern, SparseGPT, Wanda
from lit_prune.pruning.admm import normalised
from lit_prune.recipe import Recipe
from tests.pruning.test_sparsegpt import data, seen_by

PATTERNS = pytest.mark.parametrize(
    ("pattern", "rate"), [(None, 0.5), (None, 0.7), (NofM(), 0.5), (MixedNofM(8), 0.625)], ids=str
)


def slowly(weight_OI: torch.Tensor, x_PI: torch.Tensor, rate: float, penalties: list[float]) -> torch.Tensor:
    """Algorithm 1 of the paper for W^T (in, out), with a penalty per iteration."""
    x_PI, w_IO = x_PI.double(), weight_OI.double().T
    hessian_II = x_PI.T @ x_PI / len(x_PI)
    scale_II = torch.diag(hessian_II.diagonal().sqrt())
    hessian_II = torch.linalg.inv(scale_II) @ hessian_II @ torch.linalg.inv(scale_II)
    hessian_II = hessian_II + 0.1 * hessian_II.diagonal().mean() * torch.eye(len(hessian_II))
    dense_IO = w_IO = scale_II @ w_IO
    multiplier_IO = torch.zeros_like(w_IO)  # U times the penalty
    for penalty in penalties:
        u_IO = multiplier_IO / penalty
        keep_IO = torch.ones_like(w_IO, dtype=torch.bool)
        keep_IO.view(-1)[(w_IO + u_IO).abs().flatten().argsort()[: round(w_IO.numel() * rate)]] = False
        z_IO = (w_IO + u_IO) * keep_IO
        u_IO = u_IO + w_IO - z_IO
        solver_II = torch.linalg.inv(hessian_II + penalty * torch.eye(len(hessian_II)))
        w_IO = solver_II @ (hessian_II @ dense_IO + penalty * (z_IO - u_IO))
        multiplier_IO = penalty * u_IO
    return (torch.linalg.inv(scale_II) @ ((w_IO + u_IO) * keep_IO)).T


def error(pruned: torch.Tensor, weight_OI: torch.Tensor, x_PI: torch.Tensor) -> float:
    return float((x_PI @ (pruned - weight_OI).T).norm())


@pytest.mark.parametrize(
    ("method", "penalties"),
    [
        (ADMM(), [0.1 * 2 ** (iteration // 4) for iteration in range(20)]),
        (ADMM(penalty=1.0, growth=1.0), [1.0] * 20),
        (ADMM(iterations=2), [0.1, 0.4]),
    ],
    ids=["growing", "constant", "two"],
)
@pytest.mark.parametrize("rate", [0.25, 0.7])
def test_it_is_the_paper(method: ADMM, penalties: list[float], rate: float) -> None:
    (one, x_PI), (other, _) = data(12, 20), data(7, 20)
    pruned = method.prune([one, other * 100], seen_by(x_PI), rate)  # one threshold would spare the second
    for weight_OI, found in zip((one, other * 100), pruned, strict=True):
        expected = slowly(weight_OI, x_PI, rate, penalties)
        assert torch.equal(found == 0, expected == 0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_by_hand() -> None:
    seen = seen_by(torch.tensor([[3.0, 4.0], [3.0, -4.0]]))  # H = diag(9, 16)
    (pruned,) = ADMM().prune([torch.tensor([[4.0, 3.5]])], seen, 0.5)
    assert pruned[0, 0] == 0
    assert float(pruned[0, 1]) == pytest.approx(3.5, rel=0.01)


def test_one_iteration_by_hand() -> None:
    # H' = [[1.1, 0.5], [0.5, 1.1]] for D = 1; W = (1, 2): W H' = (2.1, 2.7), M = (0, 1), Z = (0, 2), U = (1, 0);
    # W' = ((2.1, 2.7) + (-1, 2)) [[2.1, 0.5], [0.5, 2.1]]^-1: its second entry is (2.1 * 4.7 - 0.5 * 1.1) / 4.16
    seen = InputStatistics(gram_II=torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    (pruned,) = ADMM(iterations=1, penalty=1.0).prune([torch.tensor([[1.0, 2.0]])], seen, 0.5)
    assert pruned[0, 0] == 0
    assert float(pruned[0, 1]) == pytest.approx(9.32 / 4.16)


def test_normalised_by_hand() -> None:
    scale_I, normalised_II = normalised(torch.tensor([[4.0, 3.0, 0.0], [3.0, 9.0, 0.0], [0.0, 0.0, 0.0]]))
    assert scale_I.tolist() == [2, 3, 1]
    assert normalised_II.tolist() == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]


@PATTERNS
def test_the_output_changes_less_than_with_sparsegpt(pattern: Pattern | None, rate: float) -> None:
    weight_OI, x_PI = data(24, 32)
    ours, theirs = (kind(pattern).prune([weight_OI], seen_by(x_PI), rate)[0] for kind in (ADMM, SparseGPT))
    assert (ours == 0).sum() == (theirs == 0).sum()
    assert error(ours, weight_OI, x_PI) < 0.95 * error(theirs, weight_OI, x_PI)


@PATTERNS
def test_what_stays_is_nearly_the_least_squares_solution(pattern: Pattern | None, rate: float) -> None:
    weight_OI, x_PI = data(6, 16)
    (pruned,) = ADMM(pattern, damping=1e-3, iterations=60).prune([weight_OI], seen_by(x_PI), rate)
    best = torch.zeros_like(pruned)
    for row_I, best_I, keep_I in zip(weight_OI, best, pruned != 0, strict=True):
        best_I[keep_I] = torch.linalg.lstsq(x_PI[:, keep_I], (x_PI @ row_I)[:, None]).solution[:, 0]
    assert error(pruned, weight_OI, x_PI) < 1.02 * error(best, weight_OI, x_PI)


def test_a_growing_penalty_leaves_less_error_than_a_constant_one() -> None:
    weight_OI, x_PI = data(24, 32)
    growing, constant = (
        ADMM(NofM(), **fields).prune([weight_OI], seen_by(x_PI), 0.5)[0]  # type: ignore[arg-type]
        for fields in ({}, {"penalty": 1.0, "growth": 1.0})
    )
    assert error(growing, weight_OI, x_PI) < error(constant, weight_OI, x_PI)


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(4, 8), NofM(1, 2)], ids=str)
def test_every_group_of_every_linear_keeps_n(pattern: NofM) -> None:
    (one, x_PI), (other, _) = data(16, 32), data(7, 32)
    for pruned in ADMM(pattern).prune([one, other], seen_by(x_PI), 0.5):
        assert ((pruned != 0).unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()


def test_pruned_weights_stay_pruned_and_count() -> None:
    weight_OI, x_PI = data(12, 40)
    weight_OI[:, 20:] *= torch.rand(12, 20, generator=torch.Generator().manual_seed(0)) > 0.6
    pruned_OI = weight_OI == 0
    (pruned,) = ADMM().prune([weight_OI], seen_by(x_PI), 0.5)
    assert (pruned[pruned_OI] == 0).all()
    assert (pruned == 0).sum() == 240


def test_a_dead_column_goes_first() -> None:
    weight_OI, x_PI = data(10, 24)
    x_PI[:, [3, 17]] = 0
    x_PI[:, 5] *= 1e-22  # its square is no normal number in float32
    (pruned,) = ADMM().prune([weight_OI], seen_by(x_PI), 0.25)
    assert not pruned[:, [3, 5, 17]].any()
    assert (pruned == 0).sum() == 60
    assert pruned.isfinite().all()


def test_more_dead_columns_than_may_go_lose_their_smallest_weights() -> None:
    weight_OI, x_PI = data(10, 24)
    x_PI[:, 8:] = 0
    (pruned,) = ADMM().prune([weight_OI], seen_by(x_PI), 0.25)
    torch.testing.assert_close(pruned[:, :8], weight_OI[:, :8])
    assert pruned[:, 8:].count_nonzero() == 100
    assert weight_OI[:, 8:][pruned[:, 8:] == 0].abs().max() < pruned[:, 8:][pruned[:, 8:] != 0].abs().min()


def test_an_expert_that_no_token_reached_loses_its_smallest_weights() -> None:
    weight_OI, _ = data(4, 6)
    (pruned,) = ADMM().prune([weight_OI], InputStatistics(gram_II=torch.zeros(6, 6)), 0.5)
    torch.testing.assert_close(pruned, torch.where(weight_OI.abs() > weight_OI.abs().median(), weight_OI, 0))


def test_fewer_tokens_than_channels_are_no_trouble() -> None:
    weight_OI, x_PI = data(8, 40, tokens=3)
    (pruned,) = ADMM().prune([weight_OI], seen_by(x_PI), 0.5)
    assert pruned.isfinite().all()
    assert (pruned == 0).sum() == 160


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite(value: float) -> None:
    with pytest.raises(InputError, match="must give linears finite inputs, got NaN.*`model.dtype` is too small"):
        ADMM().prune([torch.ones(2, 2)], InputStatistics(gram_II=torch.full((2, 2), value)), 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"damping": 0.0}, "above 0, got 0.0"),
        ({"penalty": -1.0}, "above 0, got -1.0"),
        ({"iterations": 0}, "at least 1, got 0"),
        ({"growth": 0.5}, "at least 1, a constant penalty, got 0.5"),
    ],
)
def test_settings_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=f"`ADMM.{next(iter(fields))}` must be {message}"):
        ADMM(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_a_whole_model_after_another_method(
    model: PreTrainedModel, batches: list[torch.Tensor], propagate: str
) -> None:
    prune(model, batches, Recipe(Wanda(), 0.4))
    linears = [linear for block in find_blocks(model) for linear in block.linears.values()]
    before = [linear.weight_OI == 0 for linear in linears]
    second = prune(model, batches, Recipe(ADMM(propagate=propagate), 0.6, DLP()))  # type: ignore[arg-type]
    assert all((linear.weight_OI[where] == 0).all() for linear, where in zip(linears, before, strict=True))
    assert zeros(linear.weight_OI for linear in linears)[0] / sum(second.sizes) == pytest.approx(0.6, abs=1e-3)


def test_two_of_four_in_a_whole_model(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    prune(model, batches, Recipe(ADMM(NofM()), 0.5, Uniform()))
    for block in find_blocks(model):
        for linear in block.linears.values():
            assert ((linear.weight_OI != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
