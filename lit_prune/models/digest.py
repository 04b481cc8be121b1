"""Digests of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's data type, shape and bytes, in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    sha256 = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    sha256.update(flat.view(torch.uint8).numpy().data)
    return sha256.hexdigest()
