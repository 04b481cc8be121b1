"""Tests of the precision in which the methods that solve for weights multiply float32 matrices."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from lit_prune.calibration.statistics import InputStatistics
from lit_prune.pruning import ADMM, SparseGPT
from lit_prune.pruning.full_precision import full_precision
from lit_prune.pruning.mask_method import MaskMethod

MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture(autouse=True)
def highest_afterwards() -> Iterator[None]:
    """Leaves PyTorch's default to the other tests."""
    yield
    torch.set_float32_matmul_precision("highest")


def chosen() -> list[str]:
    """Returns the precision of every backend."""
    return [matmul.fp32_precision for matmul in MATMULS]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_in_full_precision_and_the_choice_comes_back(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = chosen()
    with full_precision():
        assert chosen() == ["ieee", "ieee"]
        assert torch.get_float32_matmul_precision() == "highest"
    assert chosen() == before
    assert torch.get_float32_matmul_precision() == precision


def test_a_precision_of_one_backend_comes_back() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    before = chosen()
    with suppress(KeyError), full_precision():
        assert chosen() == ["ieee", "ieee"]
        raise KeyError
    assert chosen() == before == ["ieee", "bf16"]


@pytest.mark.parametrize("method", [SparseGPT(), ADMM()], ids=["SparseGPT", "ADMM"])
def test_solving_methods_multiply_in_full_precision(method: MaskMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    cholesky = torch.linalg.cholesky_ex

    def observed(matrix: torch.Tensor) -> object:
        seen.add(tuple(chosen()))
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", observed)
    torch.set_float32_matmul_precision("medium")
    x_PI = torch.randn(64, 16)
    method.prune([torch.randn(8, 16)], InputStatistics(gram_II=x_PI.T @ x_PI / 64), 0.5)
    assert seen == {("ieee", "ieee")}
    assert torch.get_float32_matmul_precision() == "medium"
