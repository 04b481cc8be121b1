"""The mixture of experts in a block: its tensors that have an entry for every expert, and their removal.

Suffixes: E experts that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.models.linears import EXPERT_PARTS, ExpertSlice, linears_of
from lit_prune.models.remote_code.modeling_shrunk import LayerConfig
from lit_prune.shrink.units.narrow import adopt_sizes, on_meta

EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class NoMixture(ValueError):
    """A block whose experts cannot be removed; the text says why, after "cannot shrink the family X:"."""


@dataclass(frozen=True)
class Mixture:
    """The mixture of a block.

    Attributes:
        experts: The module that holds the experts.
        axes: For each tensor of the block that has an entry for every expert, by name, the axis of the experts.
    """

    experts: nn.Module
    axes: dict[str, int]

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(getattr(self.experts, EXPERT_PARTS[0]))


def count_experts(layer: nn.Module) -> int:
    """Returns the number of experts of a block; 0 for a block without a mixture."""
    return max((len(getattr(module, EXPERT_PARTS[0])) for module in _modules(layer)), default=0)


def mixture_of(layer: nn.Module, config: Any, index: int) -> Mixture | None:
    """Returns the mixture of a block; None for a block without one.

    Its tensors are those that differ between a block of the config and one with an expert less: the experts, the rows
    of the router and its biases, whatever the family calls them.

    Args:
        layer: The block.
        config: The config of the model's text part.
        index: Number of the block.

    Raises:
        NoMixture: for a block that cannot be built from its config, and for a config that has no number of experts.
    """
    modules = _modules(layer)
    if not modules:
        return None
    if len(modules) > 1:
        raise NoMixture(f"block {index} has {len(modules)} mixtures")
    mixture = Mixture(modules.pop(), {})
    fewer = with_experts(config, mixture.count, mixture.count - 1)
    try:
        expected, built = on_meta(layer, config, index), on_meta(layer, fewer, index)
    except Exception as error:  # whatever the constructor of an unknown family raises
        raise NoMixture(f"its blocks cannot be built from their config: {error}") from error
    if _shapes(expected) != _shapes(layer):
        raise NoMixture("its blocks do not have the shapes that its config says")
    for name, shape in _shapes(expected).items():
        axis = _axis(shape, _shapes(built).get(name), mixture.count)
        if axis is not None:
            mixture.axes[name] = axis
    if not any(name.endswith(EXPERT_PARTS[0]) for name in mixture.axes):
        raise NoMixture(f"its config has no field with the {mixture.count} experts of its mixtures")
    return mixture


def with_experts(config: Any, count: int, fewer: int) -> LayerConfig:
    """Returns the config of a block with ``fewer`` experts instead of ``count``."""
    return LayerConfig(config, dict.fromkeys(expert_fields(config, count), fewer))


def expert_fields(config: Any, count: int) -> list[str]:
    """Returns the fields of a config that have the number of experts, aliases included."""
    return [name for name in EXPERT_FIELDS if getattr(config, name, None) == count]


@torch.no_grad()
def keep_experts(layer: nn.Module, mixture: Mixture, kept_E: Sequence[int], config: Any, index: int) -> LayerConfig:
    """Removes all experts but ``kept_E`` from a block, in place, and returns the config that it has now.

    Args:
        layer: The block.
        mixture: Its mixture.
        kept_E: The experts that stay, ascending.
        config: The config of the block.
        index: Number of the block.
    """
    fewer = with_experts(config, mixture.count, len(kept_E))
    for name, axis in mixture.axes.items():
        path, _, attribute = name.rpartition(".")
        owner = layer.get_submodule(path)
        tensor: Tensor = getattr(owner, attribute)
        smaller = tensor.detach().index_select(axis, torch.tensor(list(kept_E), device=tensor.device))
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
        setattr(owner, attribute, smaller)
    adopt_sizes(layer, fewer, index)
    return fewer


def parameters_of_an_expert(layer: nn.Module, mixture: Mixture) -> int:
    """Returns the number of parameters that go with one expert, its row of the router included."""
    parameters = dict(layer.named_parameters())
    return sum(parameters[name].numel() for name in mixture.axes if name in parameters) // mixture.count


def _modules(layer: nn.Module) -> set[nn.Module]:
    """The modules of fused experts."""
    return {linear.module for linear in linears_of(layer).values() if isinstance(linear, ExpertSlice)}


def _axis(shape: torch.Size, smaller: torch.Size | None, count: int) -> int | None:
    """The axis on which a tensor has an entry for every expert; None if it has none."""
    if shape == smaller:
        return None
    expected = [[size - (place == axis) for place, size in enumerate(shape)] for axis in range(len(shape))]
    if smaller is None or list(smaller) not in expected or shape[expected.index(list(smaller))] != count:
        raise NoMixture("not only the number of entries of its weights depends on the number of experts")
    return expected.index(list(smaller))


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
