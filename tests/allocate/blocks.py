"""Rates of blocks of one size."""

from lit_prune.allocate import Allocation, allocate


def rates(allocation: Allocation, scores: list[float], sparsity: float, **bounds: object) -> list[float]:
    """The rates of blocks of one size."""
    return allocate(allocation, scores, sparsity, sizes=[1] * len(scores), **bounds)  # type: ignore[arg-type]
