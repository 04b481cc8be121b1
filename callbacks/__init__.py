"""When it is done: Lightning hooks and their state, no maths."""

from lit_prune.callbacks.dynamic_pruning import DynamicPruningCallback
from lit_prune.callbacks.results import ResultsCallback
from lit_prune.callbacks.run_checkpoint import RunCheckpoint

__all__ = ["DynamicPruningCallback", "ResultsCallback", "RunCheckpoint"]
