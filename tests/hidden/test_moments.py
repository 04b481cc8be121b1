"""What makes up for dimensions that are gone."""

import pytest
import torch

from lit_prune.hidden.moments import Moments, compensation, scale_of_norm, scales_for_tied_head


def moments(full_PD: torch.Tensor, narrow_PK: torch.Tensor) -> Moments:
    found = Moments(full_PD.shape[1], narrow_PK.shape[1])
    for full, narrow in zip(full_PD.split(1), narrow_PK.split(1), strict=True):
        found.update(full, narrow)
    return found.mean()


def test_means_over_tokens() -> None:
    found = moments(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0], [4.0]]))
    assert found.cross_DK.tolist() == [[5.0], [3.0]]
    assert found.gram_KK.tolist() == [[10.0]]
    assert found.scaled(2).cross_DK.tolist() == [[10.0], [6.0]]
    assert found.scaled(2).gram_KK.tolist() == [[40.0]]


def test_the_scale_of_a_norm() -> None:
    full_PD = torch.tensor([[3.0, 0.0, 1.0], [1.0, 2.0, 1.0]])
    kept_K = torch.tensor([0, 2])
    found = moments(full_PD, 2 * full_PD[:, kept_K])
    assert scale_of_norm(found, kept_K) == pytest.approx(0.5)


def test_what_can_be_predicted_comes_back() -> None:
    """Dimension 1 is the sum of the two that stay: [1, 0], [1, 1], [0, 1]."""
    narrow_PK = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    full_PD = torch.stack([narrow_PK[:, 0], narrow_PK.sum(1), narrow_PK[:, 1]], dim=1)
    kept_K = torch.tensor([0, 2])
    matrix_DK = compensation(moments(full_PD, narrow_PK), kept_K, 1e-9)
    torch.testing.assert_close(matrix_DK.float(), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    plain_DK = compensation(moments(full_PD, narrow_PK), kept_K, 1e9)
    torch.testing.assert_close(plain_DK.float(), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))


def test_a_tied_head_is_brought_close_to_the_dense_logits() -> None:
    random = torch.Generator().manual_seed(0)
    full_PD, embedding_ND = torch.randn(60, 4, generator=random), torch.randn(9, 4, generator=random)
    kept_K, scales_K = torch.tensor([0, 1, 3]), torch.tensor([0.5, 2.0, 1.5])
    full_PD[:, 2] = 0
    found = moments(full_PD, full_PD[:, kept_K] / scales_K)
    torch.testing.assert_close(scales_for_tied_head(found, kept_K, embedding_ND, 1e-9).float(), scales_K)
    still_K = scales_for_tied_head(found, kept_K, embedding_ND, 1e9)
    torch.testing.assert_close(still_K.float(), torch.ones(3))


def test_a_norm_without_outputs() -> None:
    found = moments(torch.zeros(3, 2), torch.zeros(3, 1))
    assert scale_of_norm(found, torch.tensor([0])) == 1
    assert compensation(found, torch.tensor([0]), 0.01).tolist() == [[1.0], [0.0]]
