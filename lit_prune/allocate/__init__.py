"""Allocations of the sparsity to the blocks, one file each; jsonargparse resolves their short names once imported."""

from lit_prune.allocate.alpha_pruning import AlphaPruning
from lit_prune.allocate.arithmetic import Arithmetic
from lit_prune.allocate.base import Allocation, allocate
from lit_prune.allocate.dlp import DLP
from lit_prune.allocate.layer_redundancy import LayerRedundancy
from lit_prune.allocate.owl import OWL
from lit_prune.allocate.plan import Plan, write_plan
from lit_prune.allocate.search import Search
from lit_prune.allocate.uniform import Uniform

__all__ = [
    "DLP",
    "OWL",
    "Allocation",
    "AlphaPruning",
    "Arithmetic",
    "LayerRedundancy",
    "Plan",
    "Search",
    "Uniform",
    "allocate",
    "write_plan",
]
