"""Evaluation: perplexity, model size, tokens per second, and lm-eval tasks."""
