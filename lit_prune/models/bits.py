"""Masks as bits, eight entries a byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# the eight entries of every byte, as one integer a byte, so that one look-up unpacks it
TABLE = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8))).view(torch.int64)


def pack_bits(keep: Tensor) -> Tensor:
    """Returns a mask as uint8, eight entries a byte, the first in the highest bit: [1, 0, 1] is 160."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy().reshape(-1)))


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """Returns the mask of that shape which :func:`pack_bits` packed, where ``bits`` are."""
    entries = TABLE.to(bits.device)[bits.int()].view(torch.bool)
    return entries[: shape.numel()].reshape(shape)
