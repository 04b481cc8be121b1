"""When it is done: Lightning hooks and their state, no maths."""

from lit_prune.callbacks.dynamic_pruning import DynamicPruningCallback
from lit_prune.callbacks.results import ResultsCallback

__all__ = ["DynamicPruningCallback", "ResultsCallback"]
