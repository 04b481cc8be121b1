"""Which layout is the smallest, its bytes, and that no bit is lost."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from lit_prune.packed.pack import layout_of, pack, pack_bits, pack_folder
from lit_prune.packed.unpack import INTEGERS, check, unpack
from tests.conftest import small_model

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def sparse(share: float, shape: tuple[int, ...] = (64, 128), dtype: torch.dtype = torch.bfloat16) -> Tensor:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random)
    weight[torch.rand(shape, generator=random) < share] = 0  # multiplied by a mask, half of them would be -0.0
    return weight.to(dtype)


def grouped(n: int, m: int, shape: tuple[int, int] = (64, 128)) -> Tensor:
    """A matrix of which n of every m weights of a row are not zero."""
    random = torch.Generator().manual_seed(0)
    order = torch.rand(shape[0], shape[1] // m, m, generator=random).argsort(-1)
    return torch.randn(shape, generator=random).masked_fill((order >= n).view(shape), 0).bfloat16()


def packed_share(weight: Tensor) -> float:
    layout = layout_of(weight)
    assert layout is not None
    parts = pack(weight, layout)
    assert sum(part.nbytes for part in parts) == layout.bytes
    return layout.bytes / weight.nbytes


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same SHA-256."""
    digests = [hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).digest() for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and digests[0] == digests[1]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(64, 128), (7, 45), (3, 24, 16), (300, 1000)])
def test_no_bit_is_lost(dtype: torch.dtype, share: float, shape: tuple[int, ...]) -> None:
    weight = sparse(share, shape, dtype)
    layout = layout_of(weight)
    assert layout is not None
    packed = pack(weight, layout)
    check("w", *packed)
    assert same_bits(unpack(*packed), weight)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 8)])
def test_groups_with_fewer_values_and_several_chunks_lose_no_bit(n: int, m: int) -> None:
    weight = grouped(n, m, (1000, 552))
    weight[3, :200] = 0
    layout = layout_of(weight)
    assert layout is not None
    assert (layout.n / layout.m) == n / m
    packed = pack(weight, layout)
    check("w", *packed)
    assert same_bits(unpack(*packed), weight)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_zero_only_as_a_number_is_stored(dtype: torch.dtype) -> None:
    weight = sparse(0.8, (16, 16), dtype)
    weight[0, :4] = torch.tensor([-0.0, torch.nan, torch.inf, torch.finfo(dtype).tiny / 2])
    layout = layout_of(weight)
    assert layout is not None
    assert same_bits(unpack(*pack(weight, layout)), weight)


@pytest.mark.parametrize(
    ("weight", "most"),
    [
        (sparse(0.5, (512, 1024)), 0.57),
        (sparse(0.6, (512, 1024)), 0.47),
        (sparse(0.7, (512, 1024)), 0.37),
        (grouped(2, 4, (512, 1024)), 0.55),
        (grouped(4, 8, (512, 1024)), 0.56),
    ],
)
def test_the_bytes_that_are_left(weight: Tensor, most: float) -> None:
    assert packed_share(weight) < most


def test_two_of_four_by_hand() -> None:
    assert packed_share(grouped(2, 4)) == (64 * 128 + 64 * 32 * 3 / 8 + 40) / (64 * 128 * 2)


def test_bits_by_hand() -> None:
    assert pack_bits(torch.tensor([True, False, True])).tolist() == [5]
    assert pack_bits(torch.tensor([False] * 7 + [True, True])).tolist() == [128, 1]


@pytest.mark.parametrize(
    "weight",
    [
        sparse(0.0),
        sparse(0.05),
        sparse(1.0, (128,)),  # a norm
        sparse(0.5, (2, 4)),  # smaller than its layout
        torch.zeros(64, 64, dtype=torch.uint8),
        torch.zeros(0, 4),
    ],
    ids=str,
)
def test_what_would_not_get_smaller_is_left_as_it_is(weight: Tensor, tmp_path: Path) -> None:
    assert layout_of(weight) is None


def test_a_folder_names_its_quantiser_and_keeps_other_files(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    save_file({"a": torch.zeros(64, 64)}, tmp_path / "adapter_model.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    pack_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - before.keys() == {"unpack.py"}
    changed = {name for name, content in before.items() if (tmp_path / name).read_bytes() != content}
    assert changed == {"config.json", "model.safetensors"}
    stored = load_file(tmp_path / "model.safetensors")  # the model is dense: only checksums were added
    expected = load(before["model.safetensors"])
    assert stored.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"a"}
    assert INTEGERS[2] == torch.int16
