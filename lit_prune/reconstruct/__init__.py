"""Reconstruction: every block that was cut is trained for a moment so that its output is that of the dense block."""

from lit_prune.reconstruct.settings import Reconstruct as Reconstruct
