import pytest
import torch

from lit_prune.pruning import Pattern, Unstructured

PATTERNS = [leaf for leaf in Pattern.__subclasses__() if leaf.__module__.startswith("lit_prune.")]


def keep(scores: list[list[float]], rate: float, by_row: bool) -> list[list[int]]:
    return Unstructured().keep(torch.tensor(scores), rate, by_row=by_row).int().tolist()


def test_whole_matrix_loses_its_smallest_scores() -> None:
    assert keep([[1, 2, 3], [4, 5, 6]], 0.5, by_row=False) == [[0, 0, 0], [1, 1, 1]]


def test_rows_lose_the_same_and_the_rest_goes_where_the_next_score_is_smallest() -> None:
    assert keep([[1, 2, 3], [4, 5, 6]], 0.5, by_row=True) == [[0, 0, 1], [0, 1, 1]]
    assert keep([[6, 5, 4], [1, 9, 9]], 0.5, by_row=True) == [[1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.01, 1 / 3, 0.5, 0.777, 0.99, 1.0])
def test_count_is_exact_with_ties(rate: float, by_row: bool) -> None:
    scores = torch.rand(7, 11, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    removed = (~Unstructured().keep(scores, rate, by_row=by_row)).sum(1)
    assert removed.sum() == round(77 * rate)
    if by_row:
        assert removed.max() - removed.min() <= 1


@pytest.mark.parametrize("by_row", [True, False])
def test_what_is_gone_stays_gone_and_counts(by_row: bool) -> None:
    scores = torch.rand(6, 10, generator=torch.Generator().manual_seed(0))
    scores[0] = -1
    scores[1, :7] = -1
    kept = Unstructured().keep(scores, 0.5, by_row=by_row)
    assert not kept[scores < 0].any()
    assert (~kept).sum() == 30
    if by_row:  # row 0 lost 10 and row 1 lost 7; the other four share the 13 that are missing: 4, 3, 3, 3
        assert sorted((~kept).sum(1).tolist()) == [3, 3, 3, 4, 7, 10]


def test_more_gone_than_asked_for_removes_nothing_more() -> None:
    scores = torch.tensor([[-1.0, -1.0, -1.0, 4.0]])
    assert Unstructured().keep(scores, 0.25, by_row=True).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("leaf", PATTERNS)
@pytest.mark.parametrize("by_row", [True, False])
def test_contract(leaf: type[Pattern], by_row: bool) -> None:
    pattern = leaf()
    (rate,) = pattern.rates([0.5], [96])
    least, most = pattern.bounds(0.0, 0.99)
    assert 0 <= least <= rate <= most <= 0.99
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    kept = pattern.keep(scores, rate, by_row=by_row)
    assert torch.equal(scores, before)
    assert (kept.dtype, kept.shape) == (torch.bool, scores.shape)
    assert (~kept).sum() == round(96 * rate)
    assert torch.equal(kept, pattern.keep(scores, rate, by_row=by_row))
    scores[0, :12] = -1
    assert not pattern.keep(scores, rate, by_row=by_row)[scores < 0].any()
