"""Masks as bits, eight entries a byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def packed(keep: Tensor) -> Tensor:
    """Returns a mask as uint8, eight entries a byte, the first in the highest bit: [1, 0, 1] is 160."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy().reshape(-1)))


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """Returns the mask of that shape which :func:`packed` packed."""
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=shape.numel()).astype(bool)).reshape(shape)
