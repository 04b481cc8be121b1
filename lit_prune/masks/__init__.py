"""Weights that are exactly zero: counted, packed as bits, and kept while the rest is trained."""
