"""Depth: fewer blocks."""

from lit_prune.depth.depth import Depth

__all__ = ["Depth"]
