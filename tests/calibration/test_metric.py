"""A = |W_ij| * ||X_j|| by hand."""

import torch

from lit_prune.calibration.metric import metric_of


def test_all_linears_one_after_the_other() -> None:
    weights = {"a": torch.tensor([[1.0, -2], [0, 4]]), "b": torch.tensor([[-5.0, 6, 7]])}
    norms = {"b": torch.tensor([1.0, 0, 2]), "a": torch.tensor([3.0, 4])}
    assert metric_of(weights, norms).tolist() == [3, 8, 0, 16, 5, 0, 14]
    assert weights["a"].tolist() == [[1, -2], [0, 4]]


def test_half_precision_and_transposed_weights_give_float32() -> None:
    weight_OI = torch.tensor([[1.0, 3], [2, 4]], dtype=torch.bfloat16).T
    metric = metric_of({"a": weight_OI}, {"a": torch.tensor([1.0, 1.0009765625])})
    assert metric.dtype == torch.float32
    assert metric.tolist() == [1, 2.001953125, 3, 4.00390625]
