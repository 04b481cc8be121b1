"""The files that models are stored in, besides what transformers reads by itself."""
