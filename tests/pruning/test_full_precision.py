"""Tests of the precision in which the methods that solve for weights multiply float32 matrices."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from lit_prune.calibration.statistics import InputStatistics
from lit_prune.pruning import ADMM, SparseGPT
from lit_prune.pruning.full_precision import _matmuls, full_precision
from lit_prune.pruning.mask_method import MaskMethod


def precisions() -> list[str]:
    """Returns the precision of every backend."""
    return [matmul.fp32_precision for matmul in _matmuls()]


@pytest.fixture(autouse=True)
def highest() -> Iterator[None]:
    """Starts from PyTorch's default and leaves it to the other tests."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(params=["by backend", "at once"])
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that torch has since 2.9, and the one that it had before."""
    if request.param == "at once":
        monkeypatch.setattr("lit_prune.pruning.full_precision._matmuls", list)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_in_full_precision_and_the_choice_comes_back(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = precisions()
    with suppress(KeyError), full_precision():
        assert precisions() == ["ieee", "ieee"]
        raise KeyError
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == precision


def test_a_precision_of_one_backend_comes_back() -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    matmul.fp32_precision = "bf16"
    with full_precision():
        assert precisions() == ["ieee", "ieee"]
    assert matmul.fp32_precision == "bf16"


@pytest.mark.parametrize("method", [SparseGPT(), ADMM()], ids=["SparseGPT", "ADMM"])
def test_solving_methods_multiply_in_full_precision(method: MaskMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, cholesky = set(), torch.linalg.cholesky_ex

    def observed(matrix: torch.Tensor) -> object:
        seen.update(precisions())
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", observed)
    torch.set_float32_matmul_precision("medium")
    x_PI = torch.randn(64, 16)
    method.prune([torch.randn(8, 16)], InputStatistics(gram_II=x_PI.T @ x_PI / 64), 0.5)
    assert seen == {"ieee"}
    assert torch.get_float32_matmul_precision() == "medium"
