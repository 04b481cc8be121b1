"""Rates tried out: the loss of a model under rates, and sweeps that lower it."""
