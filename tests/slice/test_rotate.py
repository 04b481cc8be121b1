import pytest
import torch
from torch import nn

from lit_prune.models.remote_code.modeling_sliced import NormWeights
from lit_prune.slice.rotate import Covariance, centred, embed_along, project, read_along, write_along

SWAP = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # the second axis comes first


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    made = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    made.weight.data = torch.tensor(weight)
    if bias is not None:
        made.bias.data = torch.tensor(bias)
    return made


def test_axes_come_by_falling_eigenvalue_with_their_largest_entry_positive() -> None:
    covariance = Covariance()
    covariance.update(torch.tensor([[3.0, 0.0]]))
    covariance.update(torch.tensor([[0.0, -2.0]]))
    assert covariance.sum_DD is not None
    assert covariance.sum_DD.tolist() == [[9.0, 0.0], [0.0, 4.0]]
    assert covariance.principal_axes().tolist() == [[1.0, 0.0], [0.0, 1.0]]
    other = Covariance()
    other.update(torch.tensor([[-1.0, -2.0]]))
    first = other.principal_axes()[:, 0]
    torch.testing.assert_close(first, torch.tensor([1.0, 2.0], dtype=torch.float64) / 5**0.5)


def test_axes_are_found_in_float64() -> None:
    """Of a tall axis and two low ones that differ by less than float32 can tell beside it."""
    covariance = Covariance()
    covariance.update(torch.diag(torch.tensor([1e4, 0.01, 0.02])))
    assert covariance.principal_axes().dtype == torch.float64
    assert covariance.principal_axes().argmax(0).tolist() == [0, 2, 1]


def test_reading_by_hand() -> None:
    """W = [[1, 2], [3, 4]], scale [10, 1], shift [1, -1], bias [5, 6], axes swapped."""
    reader = linear([[1.0, 2.0], [3.0, 4.0]], [5.0, 6.0])
    read_along(reader, NormWeights(torch.tensor([10.0, 1.0]), torch.tensor([1.0, -1.0])), SWAP)
    assert reader.weight.tolist() == [[2.0, 10.0], [4.0, 30.0]]
    assert reader.bias.tolist() == [4.0, 5.0]


def test_reading_fewer_axes_and_a_shift_that_needs_a_bias() -> None:
    reader = linear([[1.0, 2.0], [3.0, 4.0]])
    read_along(reader, NormWeights(None, torch.tensor([1.0, 1.0])), SWAP[:, :1])
    assert reader.weight.tolist() == [[2.0], [4.0]]
    assert reader.bias.tolist() == [3.0, 7.0]
    assert (reader.in_features, reader.out_features) == (1, 2)


def test_writing_by_hand() -> None:
    writer = linear([[1.0, 2.0], [3.0, 6.0]], [5.0, 7.0])
    write_along(writer, None, centre=True)
    assert writer.weight.tolist() == [[-1.0, -2.0], [1.0, 2.0]]
    assert writer.bias.tolist() == [-1.0, 1.0]
    write_along(writer, SWAP[:, :1], centre=False)
    assert writer.weight.tolist() == [[1.0, 2.0]]
    assert writer.bias.tolist() == [1.0]
    assert (writer.in_features, writer.out_features) == (2, 1)


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_prune.slice.rotate.ROWS_AT_ONCE", 1)


def test_embeddings_by_hand() -> None:
    embedding = nn.Embedding(3, 2, dtype=torch.bfloat16)
    embedding.weight.data = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 8.0]], dtype=torch.bfloat16)
    embed_along(embedding, SWAP[:, :1], centre=True)
    assert embedding.weight.tolist() == [[1.0], [0.0], [4.0]]
    assert embedding.embedding_dim == 1
    assert embedding.weight.dtype == torch.bfloat16


def test_projection_keeps_the_type_and_computes_in_float32() -> None:
    x_BTD = torch.tensor([[[1.0, 300.0]]], dtype=torch.bfloat16)
    kept = project(x_BTD, torch.tensor([[1.0], [1.0]], dtype=torch.float64))
    assert kept.dtype == torch.bfloat16
    assert kept.item() == torch.tensor(301.0).bfloat16().item()


def test_centred() -> None:
    assert centred(torch.tensor([[1.0, 3.0]])).tolist() == [[-1.0, 1.0]]
