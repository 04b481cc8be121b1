"""SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, ICML 2023, arXiv 2301.00774.

Suffixes: O output channels, of all linears of one input one below the other; I input channels; S columns of a span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lit_prune.calibration.statistics import GRAM, InputStatistics
from lit_prune.errors import InputError
from lit_prune.progress import log
from lit_prune.prune.base import MaskMethod, Propagate
from lit_prune.prune.patterns import Pattern

DEAD = 1e-24  # what is behind a dead column costs nothing: it goes before all that does, the smallest first
Decide = Callable[[Tensor, int], Tensor]


@final
@dataclass(frozen=True)
class SparseGPT(MaskMethod):
    """Removes what costs the linear's output least, and lets the weights that stay make up for it (algorithm 1).

    H = 2/n X X^T + damping * mean(diag) * identity; U upper triangular with U^T U = H^-1. Column after column, w goes
    where w^2 / U_jj^2 is smallest, and its error w / U_jj times U_j goes to the columns on the right. What goes is
    decided `span` columns at a time, over all rows together. Tokens (3, 4) and (3, -4) make H = diag(18, 32): of the
    weights (4, 3.5) the first goes, as 16 * 18 < 12.25 * 32, and the second, which has nothing to do with it, stays.

    The weights that stay change. A column that is dead, its input always 0, goes first; an expert that no token reached
    loses its smallest weights. Linears of one input (q, k, v; gate, up) share one factorisation and one solve.

    Args:
        pattern: How the removals may lie; null is Unstructured.
        propagate: `pruned` takes the Gram matrices X X^T behind pruned blocks, as the paper does, and holds those of
            one block. `dense` takes those of the unpruned model from the pass that scores the blocks, two passes less,
            and keeps those of all blocks where the model is: 4 bytes * the square of every input's width, 0.4 GB for
            SmolLM2-135M and 22 GB for Llama-2-7B, 1.5 and 1.6 times their weights in bfloat16. null is pruned, which on
            SmolLM2-135M is better everywhere (Uniform at 0.7: perplexity 196 against 857): docs/results.md.
        damping: Share of the mean diagonal that is added to the diagonal; raised tenfold, with a line that says so,
            until H can be factorised.
        span: Columns that are decided and solved together; the paper's is 128. Groups of a pattern such as NofM are
            decided one after the other within it, as soon as the columns before them are solved.

    Raises:
        InputError: for a damping that is not above 0, a span below 1, or one that splits a group of the pattern.
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
                f"`SparseGPT.span` must be a multiple of {columns}, the columns that {self.pattern} decides together, "
                f"got {self.span}; pass `--pruning.method.span {max(self.span // columns, 1) * columns}`, or choose "
                "another m."
            )

    @property
    def _width(self) -> int:
        """Columns that are decided together."""
        assert self.pattern is not None
        return self.pattern.columns or self.span

    def prune(self, weights: Sequence[Tensor], statistics: InputStatistics, rate: float) -> list[Tensor]:
        """Returns the weights with what costs least set to 0, and the rest adjusted."""
        assert statistics.gram_II is not None
        assert self.pattern is not None
        dead_I = statistics.gram_II.diagonal() == 0
        masks = [_Mask(weight_OI, dead_I, rate, self.pattern, self._width) for weight_OI in weights]
        rows = [len(weight_OI) for weight_OI in weights]

        def decide(cost_OS: Tensor, begin: int) -> Tensor:
            parts = cost_OS.split(rows)
            return torch.cat([mask.decide(part_OS, begin) for mask, part_OS in zip(masks, parts, strict=True)])

        work_OI = torch.cat(list(weights)).float()
        factor_II = inverse_factor(2 * statistics.gram_II, self.damping)
        keep_OI = solve(work_OI, factor_II, decide, width=self._width, span=self.span)
        cast_OI = _cast(work_OI, keep_OI, weights[0].dtype)
        return list(cast_OI.split(rows))


class _Mask:
    """Decides which entries of one weight go, ``width`` columns at a time, so that exactly the rate goes in all."""

    def __init__(self, weight_OI: Tensor, dead_I: Tensor, rate: float, pattern: Pattern, width: int) -> None:
        self.pattern, self.width = pattern, width
        self.gone_OI = weight_OI == 0
        self.worth_I = torch.where(dead_I, DEAD, 1.0)
        remove = round(weight_OI.numel() * rate)
        free_OI = self.gone_OI | dead_I
        if not pattern.columns and int(free_OI.sum()) <= remove:
            self.gone_OI = free_OI
        sizes = [len(weight_OI) * part.numel() for part in dead_I.split(width)]
        gone = [int(part.sum()) for part in self.gone_OI.sum(0).cpu().split(width)]
        going = shares(gone, sizes, max(remove, sum(gone)))
        self.rates = [rate if pattern.columns else part / size for part, size in zip(going, sizes, strict=True)]

    def decide(self, cost_OS: Tensor, begin: int) -> Tensor:
        """Returns keep_OS of the columns from ``begin``; what is gone stays gone."""
        columns = slice(begin, begin + cost_OS.shape[1])
        gone_OS = self.gone_OI[:, columns]
        score_OS = (cost_OS * self.worth_I[columns]).masked_fill(gone_OS, -1)
        return self.pattern.keep(score_OS, self.rates[begin // self.width], by_row=False) & ~gone_OS


def shares(gone: Sequence[int], sizes: Sequence[int], remove: int) -> list[int]:
    """Returns how many entries go in each span, ``remove`` in all: what is gone, and of the rest everywhere one share.

    Of spans of 8, 8 and 4 entries, 4 of the second gone, 12 to go in all: half of what is left, [4, 4 + 2, 2].
    """
    new, left, going = remove - sum(gone), sum(sizes) - sum(gone), []
    for lost, size in zip(gone, sizes, strict=True):
        alive = size - lost
        part = round(new * alive / left) if left else 0
        going.append(lost + part)
        new, left = new - part, left - alive
    return going


def inverse_factor(hessian_II: Tensor, damping: float) -> Tensor:
    """Returns U, upper triangular, with U^T U the inverse of the damped Hessian; of diag(4, 16), diag(1/2, 1/4).

    H = R R^T with R upper triangular is a Cholesky factorisation from the last column to the first, and U = R^-1.

    Args:
        hessian_II: Symmetric; a 0 on the diagonal, a dead column, counts as 1. It is changed in place.
        damping: Share of the mean diagonal to add; raised until the factorisation succeeds.

    Raises:
        InputError: if no damping helps, which NaN or infinity does.
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
    raise InputError(
        "`calibration`: the input of a linear holds NaN or infinity, or numbers whose squares are too large."
    )


def solve(weight_OI: Tensor, factor_II: Tensor, decide: Decide, *, width: int, span: int) -> Tensor:
    """Prunes ``weight_OI`` in place, column after column; returns keep_OI.

    Args:
        weight_OI: fp32.
        factor_II: U of :func:`inverse_factor`.
        decide: From the cost w^2 / U_jj^2 of some columns and the first one's index, which of their entries stay.
        width: Columns that are decided together.
        span: Columns whose errors reach the rest together, a multiple of ``width``.
    """
    keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    for begin in range(0, weight_OI.shape[1], span):
        part = slice(begin, begin + span)
        w_SO, keep_SO, u_SS = weight_OI[:, part].T.contiguous(), keep_OI[:, part].T, factor_II[part, part]
        error_SO = torch.empty_like(w_SO)
        for s in range(len(w_SO)):
            if s % width == 0:
                these = slice(s, s + width)
                cost_SO = (w_SO[these] / u_SS.diagonal()[these, None]).square()
                keep_SO[these] = decide(cost_SO.T.contiguous(), begin + s).T
            kept_O = torch.where(keep_SO[s], w_SO[s], 0)
            error_SO[s] = (w_SO[s] - kept_O) / u_SS[s, s]
            w_SO[s] = kept_O
            w_SO[s + 1 :].addr_(u_SS[s, s + 1 :], error_SO[s], alpha=-1)
        weight_OI[:, part] = w_SO.T
        weight_OI[:, begin + span :].addmm_(error_SO.T, factor_II[part, begin + span :], alpha=-1)
    return keep_OI


def _cast(weight_OI: Tensor, keep_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts, and keeps what would round to 0 above it: zeros are what is pruned, and are counted."""
    cast_OI = weight_OI.to(dtype)
    return torch.where(keep_OI & (cast_OI == 0), torch.finfo(dtype).tiny, cast_OI)
