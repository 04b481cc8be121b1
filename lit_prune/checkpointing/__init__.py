"""Checkpoints of a run: what they hold, written whole or not at all, and what a resumed run must have in common."""
