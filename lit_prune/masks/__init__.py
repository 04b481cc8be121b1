"""Pruned weights, which are exactly zero: counting them, and freezing them while the others are trained."""
