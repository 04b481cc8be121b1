"""Tensors as few bytes: masks packed into bits, and digests."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

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
