"""The dense model as a teacher: each of its weights is copied, shared with the student, or lazy."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lit_prune.distill.base import TeacherOutput, TeacherState
from lit_prune.recipe import Recipe


@final
@dataclass(frozen=True)
class Logits(TeacherOutput):
    """The output of a teacher that computes all logits.

    Args:
        logits_NV: The logits.
    """

    logits_NV: Tensor

    def log_q(self, rows_R: Tensor, log_p_RV: Tensor, temperature: float) -> Tensor:
        """Returns log softmax(logits / T)."""
        return torch.log_softmax(self.logits_NV[rows_R].float() / temperature, dim=-1)


class LazyWeight(ABC):
    """A weight of the dense model that exists only during a forward pass."""

    @abstractmethod
    def materialise(self, device: torch.device) -> Tensor:
        """Returns the weight, on ``device``."""

    @abstractmethod
    def size_bytes(self) -> int:
        """Returns the bytes of what is stored in between."""


class TeacherModel(TeacherState):
    """The dense model, which runs on every batch in eval mode and without gradients.

    It is not a submodule of the LightningModule, so that no optimizer and no checkpoint includes it.

    Args:
        model: The result of :func:`teacher_model_of`.
        shared: Names of the parameters that are shared with the student.
        lazy_weights: The lazy weights by parameter name; those parameters of ``model`` are ignored.
    """

    def __init__(
        self, model: PreTrainedModel, shared: Collection[str] = (), lazy_weights: Mapping[str, LazyWeight] | None = None
    ) -> None:
        self.model, self.lazy_weights = model, lazy_weights or {}
        others = {*shared, *self.lazy_weights}
        self.copied = {name: parameter for name, parameter in model.named_parameters() if name not in others}
        _make_lazy(model, self.lazy_weights)
        self._device: torch.device | None = None

    @torch.no_grad()
    def output(self, inputs: Mapping[str, Tensor]) -> TeacherOutput:
        """Returns the logits of the dense model."""
        device = next(iter(inputs.values())).device
        if self._device != device:  # Lightning moves submodules only, and the teacher is none
            self.model.to(device)  # type: ignore[arg-type]
            self._device = device
        return Logits(self.model(**inputs, use_cache=False).logits.flatten(0, -2))

    def size_bytes(self) -> int:
        """Returns the bytes of the weights that are not shared with the student."""
        copied = sum(parameter.numel() * parameter.element_size() for parameter in self.copied.values())
        return copied + sum(weight.size_bytes() for weight in self.lazy_weights.values())

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights that are not shared with the student, on the CPU."""
        cpu = torch.device("cpu")
        lazy = {name: weight.materialise(cpu) for name, weight in self.lazy_weights.items()}
        return {name: parameter.detach().cpu() for name, parameter in self.copied.items()} | lazy


class LazyModule(nn.Module):
    """A module whose lazy weights exist only during its forward pass."""

    def __init__(self, module: nn.Module, lazy_weights: Mapping[str, LazyWeight]) -> None:
        super().__init__()
        self.module, self.lazy_weights = module, lazy_weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the module's output with its lazy weights materialised."""
        weights = {name: weight.materialise(args[0].device) for name, weight in self.lazy_weights.items()}
        return functional_call(self.module, weights, args, kwargs)


def cut_weights(model: PreTrainedModel, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Returns the parameters of ``model`` that hold the linears which ``recipe`` cuts, by name."""
    cut = {id(linear.parameter) for block in recipe.find(model) for linear in block.linears.values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in cut}


def teacher_model_of(model: PreTrainedModel, replacements: Mapping[str, nn.Parameter]) -> PreTrainedModel:
    """Returns a copy of ``model`` in eval mode, with ``replacements``, not copied, in place of its parameters."""
    parameters = dict(model.named_parameters())
    # deepcopy's memo maps ids of originals to their copies. With an entry for a parameter, deepcopy does not copy it:
    # tied weights stay tied, and no second model is ever allocated
    memo = {id(parameters[name]): replacement for name, replacement in replacements.items()}
    teacher: PreTrainedModel = copy.deepcopy(model, memo)
    return teacher.eval()


def _make_lazy(teacher: PreTrainedModel, lazy_weights: Mapping[str, LazyWeight]) -> None:
    """Wraps the modules of ``teacher`` that hold ``lazy_weights``, and frees those parameters."""
    by_module: dict[str, dict[str, LazyWeight]] = {}
    for name, weight in lazy_weights.items():
        path, _, parameter = name.rpartition(".")
        by_module.setdefault(path, {})[parameter] = weight
    for path, weights in by_module.items():
        module = teacher.get_submodule(path)
        for name in weights:
            setattr(module, name, nn.Parameter(torch.empty(0), requires_grad=False))
        teacher.set_submodule(path, LazyModule(module, weights))
