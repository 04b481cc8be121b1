"""The linears of a block: matrices that multiply activations, whatever module holds them.

Three kinds can be pruned: ``nn.Linear``; GPT-2's ``Conv1D``, which stores its matrix transposed; and each expert of a
fused mixture, a slice of a three-dimensional parameter. Routers are left out, see :func:`routers`. A fourth kind is a
linear that bitsandbytes quantised, which is read and counted, but not pruned.
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
OUTPUT = "output"
See = Callable[[str, Tensor, Tensor | None], None]
SeeExpert = Callable[[int, Tensor, Tensor], None]


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
    """One expert's slice of a fused parameter, which is (expert, out, in), or transposed in gpt-oss and Llama 4."""

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
        matrix = self.parameter.detach()[self.expert]
        return matrix.T if _is_transposed(self.module) else matrix


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

    Routers are left out, and so are fused experts of an unsupported layout, see :func:`check_experts`.
    """
    linears: list[PrunableLinear] = []
    left_out = routers(layer)
    for path, module in layer.named_modules():
        if path in left_out:
            continue
        if is_quantised(module):
            linears.append(QuantisedLinear(path, module))
        elif isinstance(module, nn.Linear):
            linears.append(DenseLinear(path, module))
        elif isinstance(module, Conv1D):
            linears.append(TransposedLinear(path, module))
        elif _is_supported(module):
            linears += [
                ExpertSlice(f"{path}.{expert}.{part}", module, part, expert)
                for expert in range(len(getattr(module, EXPERT_PARTS[0])))
                for part in EXPERT_PARTS
            ]
    return {linear.name: linear for linear in linears}


def routers(layer: nn.Module) -> set[str]:
    """Returns the names of the linears of ``layer`` that route tokens to experts.

    A router is the only linear of a module beside the experts and has one output for each of them, or a single one: the
    gate of a shared expert. Its class says nothing: routers of some families are subclasses of ``nn.Linear``.
    """
    names = set()
    for path, module in layer.named_modules():
        children = dict(module.named_children())
        experts = {name: count for name, child in children.items() if (count := _number_of_experts(name, child))}
        for name, child in children.items():
            linears = [below for below, part in child.named_modules() if isinstance(part, (nn.Linear, Conv1D))]
            if experts and name not in experts and len(linears) == 1:
                linear: Any = child.get_submodule(linears[0])
                outputs = linear.nf if isinstance(linear, Conv1D) else linear.out_features
                if outputs in {1, *experts.values()}:
                    names.add(".".join(part for part in (path, name, linears[0]) if part))
    return names


def _number_of_experts(name: str, module: nn.Module) -> int:
    """The number of experts that ``module`` holds, fused or as a list of modules; 0 for any other module."""
    if _stacked(module):
        return len(getattr(module, sorted(_stacked(module))[0]))
    if isinstance(module, nn.ModuleList) and "expert" in name:
        return len(module)
    return 0


def has_fused_experts(blocks: Iterable[nn.Module]) -> bool:
    """Returns whether ``blocks``, or other modules, have experts in 3-D parameters, of whatever layout."""
    return any(_stacked(module) for block in blocks for module in block.modules())


def check_experts(layer: nn.Module, ignored: Callable[[str], bool]) -> None:
    """Checks the layout of the fused experts of a block.

    Args:
        layer: The block.
        ignored: Whether the user leaves the module of this name alone.

    Raises:
        InputError: for fused experts of an unsupported layout that are not ignored.
    """
    for path, module in layer.named_modules():
        if _stacked(module) and not _is_supported(module) and not ignored(path):
            raise InputError(
                f"`model` must have experts of two fused parameters, {' and '.join(EXPERT_PARTS)}, as Mixtral, gpt-oss "
                f"and Llama 4 have; {path} ({type(module).__name__}) has {', '.join(sorted(_stacked(module)))} of "
                "another layout. To leave them alone and prune the rest, which may be a small part of the model: "
                f"`--pruning.ignore '[{path}]'`."
            )


def _stacked(module: nn.Module) -> set[str]:
    """The names of a module's own parameters that stack matrices."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return set()
    return {name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3}


def _is_supported(module: nn.Module) -> bool:
    """Whether ``module`` holds fused experts, each down(gate(gate_up x)), whose inputs :func:`watching` can show."""
    if _stacked(module) != set(EXPERT_PARTS):
        return False
    traits = {"has_gate": True, "has_post_expert_norm": False}
    return _is_llama4(module) or all(getattr(module, name, None) is value for name, value in traits.items())


def _is_transposed(experts: nn.Module) -> bool:
    return _is_llama4(experts) or bool(getattr(experts, "is_transposed", False))


def _is_llama4(experts: nn.Module) -> bool:
    """Whether every expert is given all tokens, those of other experts as zeros; only Llama 4 computes them so."""
    return type(experts).__name__ == "Llama4TextExperts"


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
def watching_outputs(experts: nn.Module, see: SeeExpert) -> Iterator[None]:
    """Calls ``see`` with what every expert adds to the output, whenever the mixture computes, for the context.

    ``see`` gets the number of the expert, its output times the router's weight (S, out), and the positions (S,) of the
    flattened batch that its rows belong to.
    """
    names = {(OUTPUT, expert): str(expert) for expert in range(len(getattr(experts, EXPERT_PARTS[0])))}

    def see_output(name: str, y_SO: Tensor, rows_S: Tensor | None) -> None:
        assert rows_S is not None
        see(int(name), y_SO, rows_S)

    with _one_by_one(experts, names, see_output):
        yield


@contextmanager
def _one_by_one(experts: Any, names: dict[tuple[str, int], str], see: See) -> Iterator[None]:
    """Runs fused experts one after the other, because a fused kernel shows no expert's own input to a hook."""

    biased = bool(getattr(experts, "has_bias", False))

    def show(part: str, expert: int, x_SI: Tensor, rows_S: Tensor) -> None:
        if (part, expert) in names:
            see(names[part, expert], x_SI, rows_S)

    def apply(part: str, expert: int, x_SI: Tensor) -> Tensor:
        matrix = getattr(experts, part)[expert]
        bias = getattr(experts, f"{part}_bias")[expert] if biased else None
        return F.linear(x_SI, matrix.T if _is_transposed(experts) else matrix, bias)

    def forward(x_PI: Tensor, experts_PK: Tensor, weights_PK: Tensor) -> Tensor:
        y_PO = torch.zeros_like(x_PI, dtype=torch.float32)
        for expert in range(len(experts.gate_up_proj)):
            rows_S, choice_S = torch.where(experts_PK == expert)
            x_SI = x_PI[rows_S]
            show("gate_up_proj", expert, x_SI, rows_S)
            inner_SI = experts._apply_gate(apply("gate_up_proj", expert, x_SI))
            show("down_proj", expert, inner_SI, rows_S)
            weighted_SO = apply("down_proj", expert, inner_SI) * weights_PK[rows_S, choice_S, None]
            show(OUTPUT, expert, weighted_SO, rows_S)
            y_PO.index_add_(0, rows_S, weighted_SO.float())
        return y_PO.to(x_PI.dtype)

    def forward_llama4(x_PI: Tensor) -> Tensor:
        """The router's weights are in the input already: (experts * tokens, in), zeros where it chose others."""
        outputs = []
        for expert, given_PI in enumerate(x_PI.view(len(experts.gate_up_proj), -1, x_PI.shape[-1])):
            rows_S = torch.where(given_PI.any(-1))[0]
            x_SI = given_PI[rows_S]
            show("gate_up_proj", expert, x_SI, rows_S)
            gate_SI, up_SI = apply("gate_up_proj", expert, x_SI).chunk(2, dim=-1)
            inner_SI = up_SI * experts.act_fn(gate_SI)
            show("down_proj", expert, inner_SI, rows_S)
            y_SO = apply("down_proj", expert, inner_SI)
            show(OUTPUT, expert, y_SO, rows_S)
            outputs.append(torch.zeros_like(given_PI).index_copy(0, rows_S, y_SO))
        return torch.cat(outputs)

    with patched_forward([experts], forward_llama4 if _is_llama4(experts) else forward):
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
