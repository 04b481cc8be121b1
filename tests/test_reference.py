"""What lit_prune removes against the methods by the book, which benchmarks/reference.py has."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lit_prune.allocate import DLP, Uniform
from lit_prune.families import find_blocks
from lit_prune.pipeline import Recipe, prune
from lit_prune.prune import Magnitude, MaskMethod, SparseGPT, Wanda
from tests.conftest import small_model


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sparsity", [0.5, 0.73])
@pytest.mark.parametrize("allocation", [Uniform(), DLP()], ids=str)
@pytest.mark.parametrize(
    "method", [Magnitude(), Wanda(propagate="pruned"), SparseGPT()], ids=lambda m: type(m).__name__
)
def test_same_masks_and_weights(
    reference: ModuleType, method: MaskMethod, allocation: DLP | Uniform, sparsity: float, batches: list[torch.Tensor]
) -> None:
    ours, theirs = small_model(), small_model()
    prune(ours, batches, Recipe(method, sparsity, allocation))
    dlp = isinstance(allocation, DLP)
    reference.prune(theirs, [{"input_ids": rows} for rows in batches], type(method).__name__, sparsity, dlp=dlp)
    for mine, other in zip(find_blocks(ours), find_blocks(theirs), strict=True):
        for name, linear in mine.linears.items():
            assert torch.equal(linear.weight_OI == 0, other.linears[name].weight_OI == 0), name
            torch.testing.assert_close(linear.weight_OI, other.linears[name].weight_OI, rtol=1e-3, atol=1e-5)
