"""Pruned weights as bits and values: packing, unpacking, and the loading of packed folders by transformers."""
