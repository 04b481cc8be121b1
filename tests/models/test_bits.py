import torch

from lit_prune.models.bits import pack_bits, unpack_bits


def test_by_hand_and_back() -> None:
    assert pack_bits(torch.tensor([True, False, True])).tolist() == [160]
    for shape in ((3, 5), (8,), (2, 3, 4)):
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
        assert pack_bits(keep).numel() == -(-keep.numel() // 8)
        assert torch.equal(unpack_bits(pack_bits(keep), keep.shape), keep)
