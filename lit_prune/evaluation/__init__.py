"""Perplexity, sizes, tokens per second, and lm-eval's tasks."""
