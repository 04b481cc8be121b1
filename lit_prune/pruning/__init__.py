"""Pruning methods and sparsity patterns; importing them here makes their short names resolve."""

from lit_prune.pruning.admm import ADMM
from lit_prune.pruning.base import Method
from lit_prune.pruning.magnitude import Magnitude
from lit_prune.pruning.mask_method import MaskMethod, ScoredMethod
from lit_prune.pruning.n_of_m import MixedNofM, NofM
from lit_prune.pruning.patterns import Pattern, Unstructured
from lit_prune.pruning.sparsegpt import SparseGPT
from lit_prune.pruning.wanda import Wanda

__all__ = [
    "ADMM",
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
