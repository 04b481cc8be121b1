"""The lit-prune command."""
