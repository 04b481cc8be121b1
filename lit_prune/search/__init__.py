"""Rates tried out: the loss of a model under rates, and an evolution that lowers it."""
