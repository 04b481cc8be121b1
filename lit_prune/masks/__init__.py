"""Masks: pruned weights are exactly zero; they are counted, and frozen while the other weights are trained."""
