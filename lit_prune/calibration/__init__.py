"""Calibration: windows of text that run through a model one block at a time, and the statistics of its activations."""
