"""The statistics of one block, accumulated while calibration batches run through it.

They ignore positions whose attention mask is 0; those of an expert are over the tokens that are routed to it.
Suffixes: B batch, T tokens, D hidden size, I input channels, P unmasked positions, S positions of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_prune import distributed
from lit_prune.models.families import Block
from lit_prune.models.linears import watching

INPUTS = "inputs"
COSINE = "cosine"
GRAM = "gram"
STRIPS = 8


@dataclass(frozen=True)
class InputStatistics:
    """The statistics of an input, which one or several linears read.

    Attributes:
        norm_I: ||X_j||, root mean square of each input channel, fp32; None without INPUTS.
        gram_II: Mean over tokens of x x^T, fp32; None without GRAM.
    """

    norm_I: Tensor | None = None
    gram_II: Tensor | None = None

    def to(self, device: torch.device) -> InputStatistics:
        """Returns the statistics on ``device``."""
        moved = {name: value if value is None else value.to(device) for name, value in vars(self).items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class BlockStatistics:
    """The statistics of one block.

    Attributes:
        norms: ||X_j|| by linear, shape (I,), fp32: the root mean square over the tokens that reach the linear.
        cosine: Mean over tokens of cos(block's input, block's output); None without COSINE.
        grams: Mean of x x^T by linear, shape (I, I), fp32, one tensor for all linears that share the input.
        shared_inputs: By linear, the name of the first linear with the same input.
        corrected: By linear, the weight (O, I) that makes up for errors of the blocks before, where a method has one.
    """

    norms: dict[str, Tensor] = field(default_factory=dict)
    cosine: float | None = None
    grams: dict[str, Tensor] = field(default_factory=dict)
    shared_inputs: dict[str, str] = field(default_factory=dict)
    corrected: dict[str, Tensor] = field(default_factory=dict)

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Returns ``names`` in groups that share one input; a linear without statistics is a group of its own."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.shared_inputs.get(name, name), []).append(name)
        return list(groups.values())

    def input_of(self, name: str) -> InputStatistics:
        """Returns the statistics of the input of one linear."""
        return InputStatistics(self.norms.get(name), self.grams.get(name))

    def with_linears_of(self, other: BlockStatistics) -> BlockStatistics:
        """Returns the statistics of the linears of both, and the cosine of ``other``."""
        return BlockStatistics(
            norms=self.norms | other.norms,
            cosine=other.cosine,
            grams=self.grams | other.grams,
            shared_inputs=self.shared_inputs | other.shared_inputs,
            corrected=self.corrected | other.corrected,
        )

    def to(self, device: torch.device) -> BlockStatistics:
        """Returns the statistics on ``device``; a tensor that linears share is moved once and stays shared."""
        moved: dict[int, Tensor] = {}

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: moved.setdefault(id(tensor), tensor.to(device)) for name, tensor in tensors.items()}

        return replace(self, norms=move(self.norms), grams=move(self.grams), corrected=move(self.corrected))


class InputSquares:
    """The sum of squares of every input channel of one linear, over unmasked positions."""

    def __init__(self) -> None:
        self.sum_I: Tensor | None = None
        self.tokens = 0

    def update(self, x_PI: Tensor) -> None:
        """Adds the positions of a batch, in fp32."""
        sum_I = x_PI.float().square().sum(0)
        self.sum_I = sum_I if self.sum_I is None else self.sum_I + sum_I
        self.tokens += len(x_PI)

    def sum_over_processes(self, width: int) -> None:
        """Adds the sums of the other processes; ``width`` is the number of channels, if this one has had no token."""
        self.sum_I = distributed.all_reduce_sum(torch.zeros(width) if self.sum_I is None else self.sum_I)
        self.tokens = distributed.all_reduce_count(self.tokens)

    def norm(self) -> Tensor:
        """Returns the root mean square, shape (I,); one token [3, 4] gives [3, 4]."""
        assert self.sum_I is not None
        return (self.sum_I / max(self.tokens, 1)).sqrt()


class InputGram:
    """The sum of x x^T over unmasked positions.

    The matrix is symmetric, so that half of it is enough: each of ``STRIPS`` strips of rows is computed only from the
    diagonal rightwards, which is 9/16 of the work, in matrix products that are still large enough to be fast.
    """

    def __init__(self) -> None:
        self.sum_II: Tensor | None = None
        self.tokens = 0

    def update(self, x_PI: Tensor) -> None:
        """Adds the positions of a batch, in fp32."""
        x_PI = x_PI.float()
        if self.sum_II is None:
            self.sum_II = x_PI.new_zeros(x_PI.shape[1], x_PI.shape[1])
        for strip, right in _strips(x_PI.shape[1]):
            self.sum_II[strip, right].addmm_(x_PI[:, strip].T, x_PI[:, right])
        self.tokens += len(x_PI)

    def sum_over_processes(self, width: int) -> None:
        """Adds the sums of the other processes; ``width`` is the number of channels, if this one has had no token."""
        self.sum_II = distributed.all_reduce_sum(torch.zeros(width, width) if self.sum_II is None else self.sum_II)
        self.tokens = distributed.all_reduce_count(self.tokens)

    def gram(self) -> Tensor:
        """Returns the mean, shape (I, I); one token [3, 4] gives [[9, 12], [12, 16]]."""
        assert self.sum_II is not None
        mean_II = self.sum_II.triu().div_(max(self.tokens, 1))
        return mean_II.add_(mean_II.triu(1).T)


def _strips(width: int) -> Iterator[tuple[slice, slice]]:
    """The strips of rows of a symmetric matrix, each with the columns from the diagonal rightwards."""
    step = -(-width // STRIPS)
    for begin in range(0, width, step):
        yield slice(begin, begin + step), slice(begin, width)


class Observer:
    """Accumulates statistics of one block while batches run through it.

    Linears with the same input (q, k, v; gate, up) share one statistic. They are found in the first batch, where they
    are called with the same tensor object.

    Args:
        block: The block.
        wanted: The kinds of statistics: INPUTS, COSINE, GRAM.
        constant: Whether a channel of ones is appended to every input, so that a Gram matrix has the means too.
    """

    def __init__(self, block: Block, wanted: frozenset[str], *, constant: bool = False) -> None:
        self.wanted, self.constant = wanted, constant
        self.mask_BT: Tensor | None = None
        self._linears = block.linears.values() if wanted & {INPUTS, GRAM} else ()
        self._width = {name: linear.weight_OI.shape[1] + constant for name, linear in block.linears.items()}
        self._shared_inputs: dict[str, str] = {}
        self._squares: dict[str, InputSquares] = {}
        self._grams: dict[str, InputGram] = {}
        self._first_by_id: dict[int, tuple[str, Tensor]] = {}
        self._cosine, self._tokens = 0.0, 0

    @contextmanager
    def watching(self) -> Iterator[Observer]:
        """Hooks the linears for as long as the context lasts."""
        with watching(self._linears, self._add_input):
            yield self

    def _add_input(self, name: str, x_BTI: Tensor, rows_S: Tensor | None) -> None:
        if name not in self._shared_inputs:
            # the entry keeps x alive: the next tensor may get the id of one that was freed
            first, _ = self._first_by_id.setdefault(id(x_BTI), (name, x_BTI))
            self._shared_inputs[name] = first
        if self._shared_inputs[name] == name:
            x_PI = self._unmasked(x_BTI, rows_S)
            if self.constant:
                x_PI = F.pad(x_PI, (0, 1), value=1.0)
            if INPUTS in self.wanted:
                self._squares.setdefault(name, InputSquares()).update(x_PI)
            if GRAM in self.wanted:
                self._grams.setdefault(name, InputGram()).update(x_PI)

    def add_block(self, x_BTD: Tensor, y_BTD: Tensor) -> None:
        """Adds the cosine of a block's input and output, and ends the batch, releasing its tensors."""
        self._first_by_id.clear()
        if COSINE in self.wanted:
            cosine_P = F.cosine_similarity(self._unmasked(x_BTD).float(), self._unmasked(y_BTD).float(), dim=-1)
            self._cosine += float(cosine_P.cpu().double().sum())  # float64 on the CPU, since MPS has none
            self._tokens += len(cosine_P)

    def _unmasked(self, x_BTD: Tensor, rows_S: Tensor | None = None) -> Tensor:
        """The unmasked positions, (P, D); OPT calls some of its linears with (batch * tokens, in)."""
        x_PD = x_BTD.flatten(0, -2)
        if self.mask_BT is None:
            return x_PD
        mask_P = self.mask_BT.flatten()
        return x_PD[mask_P if rows_S is None else mask_P[rows_S]]

    def statistics(self) -> BlockStatistics:
        """Returns the statistics over all batches of all processes."""
        shared_inputs = self._agreed_shared_inputs()
        self._sum_over_processes(shared_inputs.values())
        norms = {name: squares.norm() for name, squares in self._squares.items()}
        grams = {name: gram.gram() for name, gram in self._grams.items()}
        cosine, tokens = distributed.all_reduce_sum(
            torch.tensor([self._cosine, self._tokens], dtype=torch.float64)
        ).tolist()
        return BlockStatistics(
            norms={name: norms[first] for name, first in shared_inputs.items() if first in norms},
            cosine=cosine / tokens if tokens else None,
            grams={name: grams[first] for name, first in shared_inputs.items() if first in grams},
            shared_inputs=shared_inputs,
        )

    def _agreed_shared_inputs(self) -> dict[str, str]:
        """The shared inputs of all processes, since an expert may have had tokens in only some of them."""
        by_process = distributed.all_gather(self._shared_inputs)
        return {name: first for shared in reversed(by_process) for name, first in shared.items()}

    def _sum_over_processes(self, shared_inputs: Iterable[str]) -> None:
        """Replaces all sums by those over all processes."""
        # sorted, since the collective calls of all processes must come in the same order
        for name in sorted(set(shared_inputs)):
            width = self._width[name]
            if INPUTS in self.wanted:
                self._squares.setdefault(name, InputSquares()).sum_over_processes(width)
            if GRAM in self.wanted:
                self._grams.setdefault(name, InputGram()).sum_over_processes(width)
