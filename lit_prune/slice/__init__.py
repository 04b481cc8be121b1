"""Dynamic slicing: the residual stream becomes narrower, by a size of its own for every block."""

from lit_prune.slice.sizes import sizes_from_rates, sliced_parameters, slices
from lit_prune.slice.slicing import Slicing

__all__ = ["Slicing", "sizes_from_rates", "sliced_parameters", "slices"]
