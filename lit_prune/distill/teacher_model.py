"""A dense model beside the one that was cut: the same modules, its weights its own, shared, or put together in time."""

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
    """All that the teacher says.

    Args:
        logits_NV: Its logits.
    """

    logits_NV: Tensor

    def log_q(self, rows_R: Tensor, log_p_RV: Tensor, temperature: float) -> Tensor:
        """Returns log softmax(logits / T)."""
        return torch.log_softmax(self.logits_NV[rows_R].float() / temperature, dim=-1)


class LazyWeight(ABC):
    """A weight of the dense model that is put together when it is needed."""

    @abstractmethod
    def dense(self, device: torch.device) -> Tensor:
        """Returns the weight, on ``device``."""

    @abstractmethod
    def size_bytes(self) -> int:
        """Returns the bytes that are kept for it."""


class TeacherModel(TeacherState):
    """A dense model that is asked anew for every batch, in eval mode and without gradients.

    It is no part of any LightningModule, so that no optimizer and no checkpoint knows of it.

    Args:
        model: What :func:`teacher_model_of` returned.
        shared: Those of its parameters that are the student's.
        parts: Those that are put together for every pass, by name; they are no longer needed in ``model``.
    """

    def __init__(
        self, model: PreTrainedModel, shared: Collection[str] = (), parts: Mapping[str, LazyWeight] | None = None
    ) -> None:
        self.model, self.parts = model, parts or {}
        known = {*shared, *self.parts}
        self.own = {name: parameter for name, parameter in model.named_parameters() if name not in known}
        _rebuild_from(model, self.parts)
        self._device: torch.device | None = None

    @torch.no_grad()
    def output(self, inputs: Mapping[str, Tensor]) -> TeacherOutput:
        """Returns the logits of the dense model."""
        device = next(iter(inputs.values())).device
        if self._device != device:
            self.model.to(device)  # type: ignore[arg-type]
            self._device = device
        return Logits(self.model(**inputs, use_cache=False).logits.flatten(0, -2))

    def size_bytes(self) -> int:
        """Returns the bytes of what the student has not itself."""
        own = sum(parameter.numel() * parameter.element_size() for parameter in self.own.values())
        return own + sum(part.size_bytes() for part in self.parts.values())

    def weights(self) -> dict[str, Tensor]:
        """Returns what the student has not itself, on the CPU."""
        cpu = torch.device("cpu")
        parts = {name: part.dense(cpu) for name, part in self.parts.items()}
        return {name: parameter.detach().cpu() for name, parameter in self.own.items()} | parts


class Rebuilt(nn.Module):
    """A module whose weights are put together for every pass, and gone after it."""

    def __init__(self, module: nn.Module, parts: Mapping[str, LazyWeight]) -> None:
        super().__init__()
        self.module, self.parts = module, parts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module makes of its input with these weights."""
        made = {name: part.dense(args[0].device) for name, part in self.parts.items()}
        return functional_call(self.module, made, args, kwargs)


def cut_weights(model: PreTrainedModel, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Returns the parameters of ``model`` that hold the linears which ``recipe`` cuts, by name."""
    found = {id(linear.parameter) for block in recipe.find(model) for linear in block.linears.values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in found}


def teacher_model_of(model: PreTrainedModel, given: Mapping[str, nn.Parameter]) -> PreTrainedModel:
    """Returns a copy of ``model`` in eval mode, with ``given``, as they are, in the place of its parameters."""
    own = dict(model.named_parameters())
    teacher: PreTrainedModel = copy.deepcopy(model, {id(own[name]): parameter for name, parameter in given.items()})
    return teacher.eval()


def _rebuild_from(teacher: PreTrainedModel, parts: Mapping[str, LazyWeight]) -> None:
    """Lets the modules of ``teacher`` take the weights that ``parts`` names from there."""
    by_module: dict[str, dict[str, LazyWeight]] = {}
    for name, part in parts.items():
        path, _, parameter = name.rpartition(".")
        by_module.setdefault(path, {})[parameter] = part
    for path, weights in by_module.items():
        module = teacher.get_submodule(path)
        for name in weights:
            setattr(module, name, nn.Parameter(torch.empty(0), requires_grad=False))
        teacher.set_submodule(path, Rebuilt(module, weights))
