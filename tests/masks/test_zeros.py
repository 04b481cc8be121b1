import torch

from lit_prune.masks.zeros import zeros


def test_zeros() -> None:
    assert zeros([torch.tensor([0.0, 1.0]), torch.tensor([-0.0])]) == (2, 3)
