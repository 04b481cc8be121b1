"""Checkpoints of a run: their record, their weights, how they are written and how a run is resumed from one."""
