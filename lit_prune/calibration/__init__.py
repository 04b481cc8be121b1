"""Calibration windows, run through a model one block at a time, and the statistics of what passes through."""
