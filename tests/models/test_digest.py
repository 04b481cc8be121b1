"""Digests differ by type, shape and values, and do not depend on the layout in memory."""

import hashlib

import torch

from lit_prune.models.digest import digest


def test_by_hand() -> None:
    one = torch.tensor([1.0])  # 0x3f800000, little-endian
    assert digest(one) == hashlib.sha256(b"torch.float32 (1,) " + bytes([0, 0, 0x80, 0x3F])).hexdigest()
    assert digest(one.requires_grad_()) == digest(one.detach())


def test_type_shape_and_values_count_and_the_layout_does_not() -> None:
    zeros = torch.zeros(2, 3)
    assert len({digest(t) for t in (zeros, zeros.T, zeros.bfloat16(), zeros + 1, torch.tensor(0.0))}) == 5
    assert digest(zeros) == digest(torch.zeros(3, 2).T)
