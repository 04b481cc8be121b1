import torch

from lit_prune.models.bits import packed, unpacked


def test_by_hand_and_back() -> None:
    assert packed(torch.tensor([True, False, True])).tolist() == [160]
    for shape in ((3, 5), (8,), (2, 3, 4)):
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
        assert packed(keep).numel() == -(-keep.numel() // 8)
        assert torch.equal(unpacked(packed(keep), keep.shape), keep)
