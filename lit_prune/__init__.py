"""Prune a large language model while it is being fine-tuned with PyTorch Lightning, and heal it in the same run."""
