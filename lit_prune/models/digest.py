"""Digests of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's type, shape and bytes, in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    begin = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    begin.update(flat.view(torch.uint8).numpy().data)
    return begin.hexdigest()
