"""Fewer experts in the mixtures of a model."""

from lit_prune.experts.experts import Experts

__all__ = ["Experts"]
