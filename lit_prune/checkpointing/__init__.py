"""Checkpoints of a run: the record and the weights in them, atomic writing, and resuming."""
