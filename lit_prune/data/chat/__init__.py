"""Conversations as training data: their layouts, chat templates, labels of the answers, packing."""
