"""SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, ICML 2023, arXiv 2301.00774.

Suffixes: O output channels of all linears that share an input, stacked; I input channels; S columns of a span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lit_prune.calibration.statistics import GRAM, InputStatistics
from lit_prune.errors import InputError
from lit_prune.masks.zeros import cast
from lit_prune.progress import log
from lit_prune.pruning.base import Propagate
from lit_prune.pruning.full_precision import full_precision
from lit_prune.pruning.mask_method import MaskMethod
from lit_prune.pruning.patterns import Pattern
from lit_prune.pruning.updates import DEAD_COLUMN, not_finite

Decide = Callable[[Tensor, int], Tensor]


@final
@dataclass(frozen=True)
class SparseGPT(MaskMethod):
    """Removes the weights that the linear's output misses least, and updates the others to compensate (algorithm 1).

    H = 2/n X X^T + damping * mean(diag) * identity; U upper triangular with U^T U = H^-1. Column by column, weights w
    of the smallest w^2 / U_jj^2 are removed, and the error w / U_jj times U_j is subtracted from the columns to the
    right. The mask is chosen for `span` columns at a time, over all rows together. Tokens (3, 4) and (3, -4) make
    H = diag(18, 32): of the weights (4, 3.5) the first is removed, as 16 * 18 < 12.25 * 32, and the second, which is
    uncorrelated with it, stays as it is.

    The weights that stay change. A dead column, whose input is always 0, is removed first; an expert that no token was
    routed to loses its smallest weights. Linears of one input (q, k, v; gate, up) share one factorisation and solve.

    Args:
        pattern: The sparsity pattern; null is Unstructured.
        propagate: `pruned` uses the Gram matrices X X^T of the inputs that pruned blocks produce, as the paper does,
            and holds those of one block at a time. `dense` uses those of the unpruned model from the pass that scores
            the blocks, which saves two passes and keeps those of all blocks in memory: 4 bytes * the square of every
            input's width, 0.4 GB for SmolLM2-135M and 22 GB for Llama-2-7B, 1.5 and 1.6 times their weights in
            bfloat16. null is pruned, which on SmolLM2-135M is better everywhere (Uniform at 0.7: perplexity 196
            against 857): docs/results.md.
        damping: Share of the mean diagonal that is added to the diagonal; raised tenfold, and logged, until H can be
            factorised.
        span: Columns that are masked and solved together; the paper's is 128. Groups of a pattern such as NofM are
            masked one by one within the span, once the columns before them are solved.

    Raises:
        InputError: for a damping that is not above 0, a span below 1, or a span that splits a group of the pattern.
    """

    pattern: Pattern | None = None  # type: ignore[assignment]
    propagate: Propagate | None = None  # type: ignore[assignment]
    damping: float = 0.01
    span: int = 128

    needs: ClassVar[frozenset[str]] = frozenset({GRAM})
    default_propagate: ClassVar[Propagate] = "pruned"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise InputError(f"`SparseGPT.damping` must be above 0, got {self.damping}; the paper's is 0.01.")
        if self.span < 1:
            raise InputError(f"`SparseGPT.span` must be at least 1, got {self.span}; the paper's is 128.")
        if self.span % (columns := self._width):
            raise InputError(
                f"`SparseGPT.span` must be a multiple of {columns}, the columns that {self.pattern} masks together, "
                f"got {self.span}; pass `--pruning.method.span {max(self.span // columns, 1) * columns}`, or choose "
                "another m."
            )

    @property
    def _width(self) -> int:
        """Columns that are masked together."""
        assert self.pattern is not None
        return self.pattern.columns or self.span

    @full_precision()
    def prune(self, weights: Sequence[Tensor], statistics: InputStatistics, rate: float) -> list[Tensor]:
        """Returns the weights with the least costly entries set to 0 and the others updated."""
        assert statistics.gram_II is not None
        assert self.pattern is not None
        dead_I = statistics.gram_II.diagonal() == 0
        masks = [_Mask(weight_OI, dead_I, rate, self.pattern, self._width) for weight_OI in weights]
        rows = [len(weight_OI) for weight_OI in weights]

        def decide(cost_OS: Tensor, begin: int) -> Tensor:
            parts = cost_OS.split(rows)
            return torch.cat([mask.decide(part_OS, begin) for mask, part_OS in zip(masks, parts, strict=True)])

        work_OI = torch.cat(list(weights)).float()  # errors accumulate over all columns: half precision loses them
        factor_II = inverse_factor(2 * statistics.gram_II, self.damping)
        keep_OI = solve(work_OI, factor_II, decide, width=self._width, span=self.span)
        cast_OI = cast(work_OI, keep_OI, weights[0].dtype)
        return list(cast_OI.split(rows))


class _Mask:
    """Chooses the mask of one weight, ``width`` columns at a time, so that the whole weight has exactly the rate."""

    def __init__(self, weight_OI: Tensor, dead_I: Tensor, rate: float, pattern: Pattern, width: int) -> None:
        self.pattern, self.width = pattern, width
        self.pruned_OI = weight_OI == 0
        self.cost_factor_I = torch.where(dead_I, DEAD_COLUMN, 1.0)
        remove = round(weight_OI.numel() * rate)
        costless_OI = self.pruned_OI | dead_I
        # a dead column costs nothing: if the rate allows it, all count as pruned before the spans share the rest
        if not pattern.columns and int(costless_OI.sum()) <= remove:
            self.pruned_OI = costless_OI
        sizes = [len(weight_OI) * part.numel() for part in dead_I.split(width)]
        pruned = [int(part.sum()) for part in self.pruned_OI.sum(0).cpu().split(width)]
        removals = removals_of_spans(pruned, sizes, max(remove, sum(pruned)))
        self.rates = [rate if pattern.columns else part / size for part, size in zip(removals, sizes, strict=True)]

    def decide(self, cost_OS: Tensor, begin: int) -> Tensor:
        """Returns the mask of the columns from ``begin``; pruned weights stay pruned."""
        columns = slice(begin, begin + cost_OS.shape[1])
        pruned_OS = self.pruned_OI[:, columns]
        score_OS = (cost_OS * self.cost_factor_I[columns]).masked_fill(pruned_OS, -1)
        return self.pattern.keep(score_OS, self.rates[begin // self.width], by_row=False) & ~pruned_OS


def removals_of_spans(pruned: Sequence[int], sizes: Sequence[int], remove: int) -> list[int]:
    """Returns the zeros of each span, ``remove`` in total: its pruned entries, and an equal share of the rest.

    Spans of 8, 8 and 4 entries, 4 of the second one pruned, lose 12 in total as [4, 4 + 2, 2]: half of what is left.
    """
    new, unpruned, removals = remove - sum(pruned), sum(sizes) - sum(pruned), []
    for pruned_here, size in zip(pruned, sizes, strict=True):
        unpruned_here = size - pruned_here
        # a share of what remains, not of the total: rounding errors do not add up, and the last span makes it exact
        new_here = round(new * unpruned_here / unpruned) if unpruned else 0
        removals.append(pruned_here + new_here)
        new, unpruned = new - new_here, unpruned - unpruned_here
    return removals


def inverse_factor(hessian_II: Tensor, damping: float) -> Tensor:
    """Returns U, upper triangular, with U^T U the inverse of the damped Hessian: diag(4, 16) gives diag(1/2, 1/4).

    H = R R^T with R upper triangular is a Cholesky factorisation from the last column to the first, and U = R^-1. The
    authors' code inverts H and factorises the inverse, which takes one more factorisation and rounds once more.

    Args:
        hessian_II: H, symmetric, changed in place; a 0 on its diagonal, which is a dead column, counts as 1.
        damping: Share of the mean diagonal that is added; raised until the factorisation succeeds.

    Raises:
        InputError: if no damping is enough, which NaN or infinity causes.
    """
    diagonal_I = hessian_II.diagonal()
    mean = diagonal_I.mean()
    base_I = diagonal_I.masked_fill(diagonal_I == 0, 1)
    for _ in range(8):
        diagonal_I.copy_(base_I + damping * mean)
        lower_II, failed = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
        if not failed and lower_II.isfinite().all():
            identity_II = torch.eye(len(base_I), device=base_I.device)
            return torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True)
        damping *= 10
        log(f"SparseGPT: X X^T of {len(base_I)} inputs cannot be factorised, damping raised to {damping:g}")
    raise not_finite()


def solve(weight_OI: Tensor, factor_II: Tensor, decide: Decide, *, width: int, span: int) -> Tensor:
    """Prunes ``weight_OI`` in place, column by column, and returns the mask keep_OI.

    Args:
        weight_OI: float32.
        factor_II: U of :func:`inverse_factor`.
        decide: Returns the mask of ``width`` columns, from their costs w^2 / U_jj^2 and the index of the first one.
        width: Columns that are masked together.
        span: Columns whose errors are subtracted from all later columns in one product, a multiple of ``width``.
    """
    keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    for begin in range(0, weight_OI.shape[1], span):
        part = slice(begin, begin + span)
        # transposed, so that a column is contiguous in memory: the loop over columns is memory-bound
        w_SO, keep_SO, u_SS = weight_OI[:, part].T.contiguous(), keep_OI[:, part].T, factor_II[part, part]
        error_SO = torch.empty_like(w_SO)
        for s in range(len(w_SO)):
            if s % width == 0:
                group = slice(s, s + width)
                cost_SO = (w_SO[group] / u_SS.diagonal()[group, None]).square()
                keep_SO[group] = decide(cost_SO.T.contiguous(), begin + s).T
            kept_O = torch.where(keep_SO[s], w_SO[s], 0)
            error_SO[s] = (w_SO[s] - kept_O) / u_SS[s, s]
            w_SO[s] = kept_O
            w_SO[s + 1 :].addr_(u_SS[s, s + 1 :], error_SO[s], alpha=-1)
        weight_OI[:, part] = w_SO.T
        weight_OI[:, begin + span :].addmm_(error_SO.T, factor_II[part, begin + span :], alpha=-1)
    return keep_OI
