"""Products of float32 matrices in full precision, whatever precision the user has chosen for the model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes the products of float32 matrices in float32 for as long as the context lasts.

    ``torch.set_float32_matmul_precision("medium")`` rounds their factors to TF32 or bfloat16. That is enough for
    the activations of a model, and not for the solution of a linear system, where the errors in the large eigenvalues
    of a Hessian are as large as its small ones.
    """
    if matmuls := _matmuls():
        chosen = [matmul.fp32_precision for matmul in matmuls]
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            for matmul, precision in zip(matmuls, chosen, strict=True):
                matmul.fp32_precision = precision
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _matmuls() -> list[Any]:
    """The backends that have a precision of their own for products; none before torch 2.9."""
    backends = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    return [matmul for matmul in backends if hasattr(matmul, "fp32_precision")]
