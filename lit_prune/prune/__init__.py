"""Pruning methods and sparsity patterns; importing them here makes their short names resolve."""

from lit_prune.prune.base import MaskMethod, Method, ScoredMethod
from lit_prune.prune.magnitude import Magnitude
from lit_prune.prune.n_of_m import MixedNofM, NofM
from lit_prune.prune.patterns import Pattern, Unstructured
from lit_prune.prune.sparsegpt import SparseGPT
from lit_prune.prune.wanda import Wanda

__all__ = [
    "Magnitude",
    "MaskMethod",
    "Method",
    "MixedNofM",
    "NofM",
    "Pattern",
    "ScoredMethod",
    "SparseGPT",
    "Unstructured",
    "Wanda",
]
