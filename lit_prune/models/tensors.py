"""Tensors as few bytes: masks packed into bits, digests, and chunks of large matrices."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 4 * 2**20}  # what its caches hold, and the allocator gives without asking the system
OTHER_CHUNK_BYTES = 128 * 2**20

# for each byte, its eight entries as one int64 (eight bools), so that unpacking a byte is one look-up
TABLE = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8))).view(torch.int64)


def pack_bits(keep: Tensor) -> Tensor:
    """Returns a mask packed into uint8, eight entries per byte, the first in the highest bit: [1, 0, 1] is 160."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy().reshape(-1)))


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """Returns the mask that :func:`pack_bits` packed, in the given shape and on the device of ``bits``."""
    entries = TABLE.to(bits.device)[bits.int()].view(torch.bool)
    return entries[: shape.numel()].reshape(shape)


def digest(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's data type, shape and bytes, in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    sha256 = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    sha256.update(flat.view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def rows_at_once(matrix: Tensor) -> int:
    """Returns how many rows of ``matrix`` to compute on at a time in float32, at least one.

    They are 4 MiB on a CPU, which is several times faster there with a large vocabulary, and 128 MiB elsewhere.
    """
    return max(1, CHUNK_BYTES.get(matrix.device.type, OTHER_CHUNK_BYTES) // (4 * max(1, matrix.shape[-1])))
