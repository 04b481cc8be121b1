"""Lightning callbacks: hooks that call the stages of lit_prune at the right time, and the state that they keep."""

from lit_prune.callbacks.dynamic_pruning import DynamicPruningCallback
from lit_prune.callbacks.results import ResultsCallback
from lit_prune.callbacks.run_checkpoint import RunCheckpoint

__all__ = ["DynamicPruningCallback", "ResultsCallback", "RunCheckpoint"]
