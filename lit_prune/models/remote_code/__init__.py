"""Modeling files that are saved with exported folders, where they serve as remote code of transformers."""
