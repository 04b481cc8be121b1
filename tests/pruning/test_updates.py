import pytest
import torch

from lit_prune.calibration.statistics import InputStatistics
from lit_prune.errors import InputError
from lit_prune.pruning import ADMM, SparseGPT


@pytest.mark.parametrize("method", [ADMM(), SparseGPT()])
def test_inputs_that_are_not_finite_are_refused(method: ADMM | SparseGPT) -> None:
    statistics = InputStatistics(gram_II=torch.full((2, 2), torch.nan))
    with pytest.raises(InputError, match="must give linears finite inputs, got NaN"):
        method.prune([torch.ones(3, 2)], statistics, 0.5)
