"""Hugging Face causal LMs: loading them, finding their blocks and linears, the record of what was done to them."""
