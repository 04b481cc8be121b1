"""ADMM: Fast and Effective Weight Update for Pruned Large Language Models, TMLR 2024, arXiv 2401.02938.

Suffixes: O output channels, I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor

from lit_prune.calibration.statistics import GRAM, InputStatistics
from lit_prune.errors import InputError
from lit_prune.masks.zeros import cast
from lit_prune.pruning.base import Propagate
from lit_prune.pruning.full_precision import full_precision
from lit_prune.pruning.mask_method import MaskMethod
from lit_prune.pruning.patterns import Pattern
from lit_prune.pruning.updates import DEAD_COLUMN, not_finite

STAGES = 5  # the penalty grows from each to the next


@final
@dataclass(frozen=True)
class ADMM(MaskMethod):
    """Finds the mask and the remaining weights together, by the alternating direction method of multipliers.

    The output X W^T is to change least. With H = X X^T / n, D = diag(H)^1/2, H' = D^-1 H D^-1 + damping * identity,
    W' = W D and U = 0, an iteration is

        M = the largest abs(W' + U), as many as stay;    Z = M * (W' + U);    U = U + W' - Z;
        W' = (W D H' + penalty * (Z - U)) (H' + penalty * identity)^-1.

    The pruned weights are M * (W' + U) D^-1 at the end; U is 0 where M is true. Tokens (3, 4) and (3, -4) make
    H = diag(9, 16): of the weights (4, 3.5) the first is removed, as 4 * 3 < 3.5 * 4, and the second, which is
    uncorrelated with it, stays at 3.51.

    The paper has a constant penalty of 1, a damping of 0.1, and a sparsity that rises over the first 15 iterations.
    Here the penalty grows instead, as in ALPS (arXiv 2406.07831): while it is small, weights change their places, and
    later these settle. That leaves less of the error than the paper's schedule does, most of all for N:M patterns.

    The weights that stay change. A dead column, whose input is always 0, is removed first; an expert that no token was
    routed to loses its smallest weights. Linears of one input (q, k, v; gate, up) share the inverses.

    Args:
        pattern: The sparsity pattern; null is Unstructured.
        propagate: `pruned` uses the Gram matrices X X^T of the inputs that pruned blocks produce, and holds those of
            one block at a time; `dense` uses those of the unpruned model and keeps those of all blocks, as described
            for SparseGPT. null is pruned.
        damping: Number that is added to the diagonal of D^-1 H D^-1, which is 1.
        iterations: Number of iterations.
        penalty: Penalty in the first fifth of the iterations.
        growth: Factor by which the penalty grows from each fifth to the next; 1 keeps it constant.

    Raises:
        InputError: for a damping or a penalty that is not above 0, iterations below 1, or a growth below 1.
    """

    pattern: Pattern | None = None  # type: ignore[assignment]
    propagate: Propagate | None = None  # type: ignore[assignment]
    damping: float = 0.1
    iterations: int = 20
    penalty: float = 0.1
    growth: float = 2.0

    needs: ClassVar[frozenset[str]] = frozenset({GRAM})
    default_propagate: ClassVar[Propagate] = "pruned"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("damping", "penalty"):
            if not getattr(self, name) > 0:
                raise InputError(f"`ADMM.{name}` must be above 0, got {getattr(self, name)}; the default is 0.1.")
        if self.iterations < 1:
            raise InputError(f"`ADMM.iterations` must be at least 1, got {self.iterations}; the paper's are 20.")
        if not self.growth >= 1:
            raise InputError(f"`ADMM.growth` must be at least 1, a constant penalty, got {self.growth}.")

    @full_precision()
    def prune(self, weights: Sequence[Tensor], statistics: InputStatistics, rate: float) -> list[Tensor]:
        """Returns the weights with entries set to 0 and the others updated."""
        assert statistics.gram_II is not None
        dead_I = dead(statistics.gram_II)
        scale_I, hessian_II = normalised(statistics.gram_II)
        hessian_II.diagonal().add_(self.damping)
        inverses = {penalty: inverse(hessian_II, penalty) for penalty in self._penalties()}
        pruned = []
        for weight_OI in weights:
            decide = partial(self._keep, dense_OI=weight_OI, dead_I=dead_I, rate=rate)
            scaled_OI, keep_OI = self._solve(weight_OI.float() * scale_I, hessian_II, inverses, decide)
            pruned.append(cast(scaled_OI / scale_I, keep_OI, weight_OI.dtype))
        return pruned

    def _penalties(self) -> list[float]:
        """Returns the penalty of every iteration."""
        stages = [iteration * STAGES // self.iterations for iteration in range(self.iterations)]
        return [self.penalty * self.growth**stage for stage in stages]

    def _keep(self, sum_OI: Tensor, dense_OI: Tensor, dead_I: Tensor, rate: float) -> Tensor:
        """Returns the mask of the largest W' + U; pruned weights stay pruned."""
        assert self.pattern is not None
        score_OI = torch.where(dead_I, dense_OI.float().abs() * DEAD_COLUMN, sum_OI.abs())
        pruned_OI = dense_OI == 0
        return self.pattern.keep(score_OI.masked_fill(pruned_OI, -1), rate, by_row=False) & ~pruned_OI

    def _solve(
        self, dense_OI: Tensor, hessian_II: Tensor, inverses: Mapping[float, Tensor], decide: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns M * W' and M after the last iteration; U is 0 where M is true.

        Args:
            dense_OI: W D.
            hessian_II: H'.
            inverses: (H' + penalty * identity)^-1 by penalty.
            decide: Returns M from W' + U.
        """
        target_OI, weight_OI = dense_OI @ hessian_II, dense_OI
        multiplier_OI = torch.zeros_like(dense_OI)  # penalty * U, which is comparable between penalties
        for penalty in self._penalties():
            sum_OI = weight_OI + multiplier_OI / penalty
            keep_OI = decide(sum_OI)
            multiplier_OI = penalty * torch.where(keep_OI, 0, sum_OI)
            weight_OI = (target_OI + penalty * torch.where(keep_OI, sum_OI, 0) - multiplier_OI) @ inverses[penalty]
        return torch.where(keep_OI, weight_OI, 0), keep_OI


def dead(gram_II: Tensor) -> Tensor:
    """Returns which columns are dead, bool, (I,): those whose input is 0, or too small for its square to be precise."""
    return gram_II.diagonal() < torch.finfo(gram_II.dtype).tiny


def normalised(gram_II: Tensor) -> tuple[Tensor, Tensor]:
    """Returns D = diag(H)^1/2 and D^-1 H D^-1; [[4, 3], [3, 9]] gives (2, 3) and [[1, 0.5], [0.5, 1]].

    The input of a dead column counts as uncorrelated with the others, and its D as 1.
    """
    dead_I = dead(gram_II)
    scale_I = gram_II.diagonal().sqrt().masked_fill(dead_I, 1)
    normalised_II = (gram_II / scale_I / scale_I[:, None]).masked_fill(dead_I | dead_I[:, None], 0)
    normalised_II.diagonal().add_(dead_I)
    return scale_I, normalised_II


def inverse(hessian_II: Tensor, penalty: float) -> Tensor:
    """Returns (H' + penalty * identity)^-1; float32 is enough, as its eigenvalues are at least the penalty.

    Raises:
        InputError: for NaN or infinity in H'.
    """
    shifted_II = hessian_II.clone()
    shifted_II.diagonal().add_(penalty)
    lower_II, failed = torch.linalg.cholesky_ex(shifted_II)
    if failed or not lower_II.isfinite().all():
        raise not_finite()
    return torch.cholesky_inverse(lower_II)
