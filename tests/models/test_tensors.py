"""Masks come back from their bits; digests differ by type, shape and values, and not by the layout in memory."""

import hashlib

import torch

from lit_prune.models.tensors import digest, pack_bits, rows_at_once, unpack_bits


def test_by_hand_and_back() -> None:
    assert pack_bits(torch.tensor([True, False, True])).tolist() == [160]
    for shape in ((3, 5), (8,), (2, 3, 4)):
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
        assert pack_bits(keep).numel() == -(-keep.numel() // 8)
        assert torch.equal(unpack_bits(pack_bits(keep), keep.shape), keep)


def test_a_digest_by_hand() -> None:
    one = torch.tensor([1.0])  # 0x3f800000, little-endian
    assert digest(one) == hashlib.sha256(b"torch.float32 (1,) " + bytes([0, 0, 0x80, 0x3F])).hexdigest()
    assert digest(one.requires_grad_()) == digest(one.detach())


def test_type_shape_and_values_count_and_the_layout_does_not() -> None:
    zeros = torch.zeros(2, 3)
    assert len({digest(t) for t in (zeros, zeros.T, zeros.bfloat16(), zeros + 1, torch.tensor(0.0))}) == 5
    assert digest(zeros) == digest(torch.zeros(3, 2).T)


def test_a_chunk_takes_the_bytes_of_its_device_in_float32_whatever_the_type() -> None:
    logits = torch.empty(3, 2**15, dtype=torch.bfloat16)
    assert rows_at_once(logits) == 32
    assert rows_at_once(logits.to("meta")) == 1024
    assert rows_at_once(torch.empty(1, 2**21)) == 1
