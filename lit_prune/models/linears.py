"""The linears of a block: matrices that multiply activations, whatever module holds them.

Three kinds can be pruned: ``nn.Linear``; GPT-2's ``Conv1D``, which stores its matrix transposed; and each expert of a
fused mixture, a slice of a three-dimensional parameter. Routers are not linears. A fourth kind is a linear that
bitsandbytes quantised, which is read and counted, but not pruned.
Suffixes: O output channels, I input channels, P positions of a batch, S those of them that an expert is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import InputError
from lit_prune.models.quantised import dequantised, is_quantised, pruned

EXPERT_PARTS = ("gate_up_proj", "down_proj")
See = Callable[[str, Tensor, Tensor | None], None]


class PrunableLinear(ABC):
    """One matrix of a block, read and written as (out, in).

    Attributes:
        name: Name within the block, which `targets` and `ignore` match.
        module: The module that holds the matrix, and perhaps others beside it.
    """

    name: str
    module: nn.Module

    @property
    @abstractmethod
    def parameter(self) -> Tensor:
        """The parameter that holds the matrix, and perhaps more."""

    @property
    @abstractmethod
    def weight_OI(self) -> Tensor:
        """The matrix, (out, in): a view of the parameter, without its gradient."""

    @property
    def size(self) -> int:
        """Number of its weights."""
        return self.weight_OI.numel()

    @property
    def pruned(self) -> int:
        """Number of its weights that are pruned: those that are zero."""
        return self.size - int(torch.count_nonzero(self.weight_OI))

    def write(self, weight_OI: Tensor) -> None:
        """Puts ``weight_OI`` in the place of the matrix."""
        self.weight_OI.copy_(weight_OI)


@final
@dataclass(frozen=True)
class DenseLinear(PrunableLinear):
    """The matrix of an ``nn.Linear``."""

    name: str
    module: nn.Linear

    @property
    def parameter(self) -> Tensor:
        """The module's weight."""
        return self.module.weight

    @property
    def weight_OI(self) -> Tensor:
        """The module's weight as it is."""
        return self.module.weight.detach()


@final
@dataclass(frozen=True)
class TransposedLinear(PrunableLinear):
    """The matrix of a ``Conv1D``, which is stored (in, out)."""

    name: str
    module: Conv1D

    @property
    def parameter(self) -> Tensor:
        """The module's weight."""
        return self.module.weight

    @property
    def weight_OI(self) -> Tensor:
        """The module's weight, transposed."""
        return self.module.weight.detach().T


@final
@dataclass(frozen=True)
class ExpertSlice(PrunableLinear):
    """One expert's slice of a fused parameter, which is (expert, out, in)."""

    name: str
    module: nn.Module
    part: str
    expert: int

    @property
    def parameter(self) -> Tensor:
        """The parameter of all experts together."""
        return getattr(self.module, self.part)

    @property
    def weight_OI(self) -> Tensor:
        """The slice of this expert."""
        return self.parameter.detach()[self.expert]


@final
@dataclass(frozen=True)
class QuantisedLinear(PrunableLinear):
    """The matrix of a linear in 4 or 8 bits."""

    name: str
    module: nn.Linear

    @property
    def parameter(self) -> Tensor:
        """The packed weight."""
        return self.module.weight

    @property
    def weight_OI(self) -> Tensor:
        """The dequantised matrix, a copy."""
        return dequantised(self.module)

    @property
    def size(self) -> int:
        """Number of its weights, which are more than the packed weight has entries."""
        return self.module.out_features * self.module.in_features

    @property
    def pruned(self) -> int:
        """Number of weights that its mask says were pruned; rounding makes more of them zero."""
        return pruned(self.module)

    def write(self, weight_OI: Tensor) -> None:
        """Raises TypeError: a quantised matrix is not written to."""
        raise TypeError(f"{self.name} is quantised, and cannot be written to.")


def linears_of(layer: nn.Module) -> dict[str, PrunableLinear]:
    """Returns all linears of a block by name; an expert's are named `<path of the experts>.<expert>.<parameter>`.

    Raises:
        InputError: for fused experts that are laid out in another way.
    """
    linears: list[PrunableLinear] = []
    for path, module in layer.named_modules():
        if is_quantised(module):
            linears.append(QuantisedLinear(path, module))
        elif isinstance(module, nn.Linear):
            linears.append(DenseLinear(path, module))
        elif isinstance(module, Conv1D):
            linears.append(TransposedLinear(path, module))
        elif _is_fused(path, module):
            linears += [
                ExpertSlice(f"{path}.{expert}.{part}", module, part, expert)
                for expert in range(len(getattr(module, EXPERT_PARTS[0])))
                for part in EXPERT_PARTS
            ]
    return {linear.name: linear for linear in linears}


def has_fused_experts(model: nn.Module) -> bool:
    """Returns whether ``model`` has experts in three-dimensional parameters, of whatever layout."""
    return any(_stacked(module) for module in model.modules())


def _stacked(module: nn.Module) -> set[str]:
    """The names of a module's own parameters that stack matrices."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return set()
    return {name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3}


def _is_fused(path: str, module: nn.Module) -> bool:
    """Whether ``module`` holds fused experts, each down(act(gate x) * (up x)) without biases, weights (out, in)."""
    stacked = _stacked(module)
    if not stacked:
        return False
    traits = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
    if stacked == set(EXPERT_PARTS) and all(getattr(module, name, None) is value for name, value in traits.items()):
        return True
    raise InputError(
        f"`model` must have experts of two fused parameters, {' and '.join(EXPERT_PARTS)}, (expert, out, in), without "
        f"biases, as Mixtral and Qwen3-MoE have; {path} ({type(module).__name__}) has {', '.join(sorted(stacked))} of "
        "another layout, and pruning the rest alone would miss most of the model."
    )


@contextmanager
def watching(linears: Iterable[PrunableLinear], see: See) -> Iterator[None]:
    """Calls ``see`` with the input of every linear whenever it computes, for the context.

    ``see`` gets the linear's name, its input (..., in), and, for an expert, the positions (S,) of the flattened batch
    that the rows of the input belong to; None means all positions, in order. It is called for idle experts too, whose
    input has no rows.
    """
    experts: dict[nn.Module, dict[tuple[str, int], str]] = {}
    with ExitStack() as stack:
        for linear in linears:
            if isinstance(linear, ExpertSlice):
                experts.setdefault(linear.module, {})[linear.part, linear.expert] = linear.name
            else:
                hook = linear.module.register_forward_pre_hook(
                    lambda _module, args, name=linear.name: see(name, args[0], None)
                )
                stack.callback(hook.remove)
        for module, names in experts.items():
            stack.enter_context(_one_by_one(module, names, see))
        yield


@contextmanager
def _one_by_one(experts: Any, names: dict[tuple[str, int], str], see: See) -> Iterator[None]:
    """Runs fused experts one after the other, because a fused kernel shows no expert's own input to a hook."""

    def forward(x_PI: Tensor, experts_PK: Tensor, weights_PK: Tensor) -> Tensor:
        y_PO = torch.zeros_like(x_PI, dtype=torch.float32)
        for expert, (gate_up_OI, down_OI) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            rows_S, choice_S = torch.where(experts_PK == expert)
            x_SI = x_PI[rows_S]
            inner_SI = experts._apply_gate(F.linear(x_SI, gate_up_OI))
            for part, given_SI in zip(EXPERT_PARTS, (x_SI, inner_SI), strict=True):
                if (part, expert) in names:
                    see(names[part, expert], given_SI, rows_S)
            weighted_SO = F.linear(inner_SI, down_OI) * weights_PK[rows_S, choice_S, None]
            y_PO.index_add_(0, rows_S, weighted_SO.float())
        return y_PO.to(x_PI.dtype)

    with patched_forward([experts], forward):
        yield


@contextmanager
def patched_forward(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the ``forward`` of each module for the context."""
    originals = [(module, module.__dict__.get("forward")) for module in modules]
    for module, _ in originals:
        module.forward = forward
    try:
        yield
    finally:
        for module, original in originals:
            del module.forward  # the class's own is visible again
            if original is not None:
                module.forward = original
