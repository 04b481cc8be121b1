"""Smaller blocks: their weights, the sizes that their modules remember, and the config and class of their model.

Suffixes: U units that stay, O rows and I columns of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.models.families import dense_family
from lit_prune.models.linears import PrunableLinear, linears_of
from lit_prune.models.remote_code.modeling_shrunk import (
    PREFIX,
    SHRUNK,
    LayerConfig,
    layer_config,
)
from lit_prune.shrink.units.parts import NoPart, Part

SIZES = "block_sizes"


@torch.no_grad()
def narrow(layer: nn.Module, part: Part, kept_U: Tensor) -> None:
    """Removes the rows and columns of all other units from the linears of a block, in place."""
    linears = linears_of(layer)
    for name, rows_UR in part.rows.items():
        linear: Any = linears[name]
        rows_O = rows_UR[kept_U.cpu()].flatten().sort().values.to(linear.weight_OI.device)
        bias_O = linear.module.bias
        set_weight(linear, linear.weight_OI[rows_O], None if bias_O is None else bias_O.detach()[rows_O])
    writer: Any = linears[part.writer]
    columns_I = part.columns_UK[kept_U.cpu()].flatten().sort().values.to(writer.weight_OI.device)
    set_weight(writer, writer.weight_OI[:, columns_I], writer.module.bias)


def set_weight(linear: PrunableLinear, weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """Replaces the weight and the bias of a linear by others, which may be of another shape."""
    module: Any = linear.module
    trained, transposed = module.weight.requires_grad, isinstance(module, Conv1D)
    matrix = (weight_OI.T if transposed else weight_OI).contiguous().to(module.weight.dtype)
    module.weight = nn.Parameter(matrix, requires_grad=trained)
    if bias_O is not None:
        module.bias = nn.Parameter(bias_O.detach().to(module.bias.dtype), requires_grad=module.bias.requires_grad)
    if transposed:
        module.nx, module.nf = matrix.shape
    else:
        module.out_features, module.in_features = matrix.shape


def adopt_sizes(layer: nn.Module, config: Any, index: int) -> None:
    """Gives the modules of a block the config and the sizes that those of a new block of ``config`` have."""
    for module, like in zip(layer.modules(), on_meta(layer, config, index).modules(), strict=True):
        for name, value in vars(like).items():
            if type(value) is int or isinstance(value, (PreTrainedConfig, LayerConfig)):
                setattr(module, name, value)


def check_part(layer: nn.Module, part: Part, config: Any, index: int) -> None:
    """Checks that a block of another size can be built from its config, and that only the part's weights depend on it.

    Args:
        layer: The block.
        part: The part that is to become smaller.
        config: The config of the block.
        index: Number of the block.

    Raises:
        NoPart: if it does not.
    """
    kept_U = torch.arange(part.units)[: max(1, part.units - 1)]
    try:
        expected = on_meta(layer, config, index)
        built = on_meta(layer, LayerConfig(config, part.sizes(len(kept_U))), index)
    except Exception as error:  # whatever the constructor of an unknown family raises
        raise NoPart(f"its blocks cannot be built from their config: {error}") from error
    if _shapes(expected) != _shapes(layer):
        raise NoPart("its blocks do not have the shapes that its config says")
    narrow(expected, part, kept_U)
    wrong = [name for name, shape in _shapes(expected).items() if _shapes(built).get(name) != shape]
    if wrong:
        raise NoPart(f"its config has no place for the sizes of {wrong[0]}")


def config_error(config: PreTrainedConfig, fields: Mapping[str, int]) -> str | None:
    """Returns why the family's own class does not accept the config with other ``fields``; None if it does.

    The config of a model whose blocks differ has a class that checks nothing.
    """
    own: Any = type(config).__mro__[1] if config.model_type.startswith(PREFIX) else type(config)
    known = {name: value for name, value in config.to_dict().items() if name not in (SIZES, "model_type")}
    try:
        own.from_dict({**known, **fields})
    except Exception as error:  # whatever the config of a family raises
        return str(error.__cause__ or error)
    return None


def set_sizes(model: PreTrainedModel, layers: Iterable[nn.Module], sizes: Mapping[str, Sequence[int]]) -> None:
    """Records the sizes of the blocks in the config of ``model``, and gives the model the class that has them.

    Fields that are the same in all blocks are ordinary fields of the config, as far as its class accepts these values:
    that of Llama has no 5 heads for 32 dimensions. If all are, the model is of its family's own class; else of the
    shrunk class, see ``modeling_shrunk``.

    Args:
        model: The model, whose weights have these sizes already.
        layers: Its blocks.
        sizes: Values of fields of the config, one for every block.
    """
    config: Any = model.config.get_text_config()
    differing = {**(getattr(config, SIZES, None) or {}), **{name: list(values) for name, values in sizes.items()}}
    equal = {name: values[0] for name, values in differing.items() if len(set(values)) == 1}
    for name, value in _accepted(config, equal, sizes).items():
        setattr(config, name, value)
        del differing[name]
    _set_class(model, shrunk=bool(differing))
    if differing:
        config.block_sizes = differing
    for index, layer in enumerate(layers):
        adopt_sizes(layer, layer_config(config, index), index)


def _accepted(config: PreTrainedConfig, fields: Mapping[str, int], new: Iterable[str]) -> dict[str, int]:
    """Returns those of ``fields`` that the class of the config accepts: all, or else those that are not ``new``."""
    for accepted in (dict(fields), {name: value for name, value in fields.items() if name not in new}):
        if config_error(config, accepted) is None:
            return accepted
    return {}


def _set_class(model: PreTrainedModel, *, shrunk: bool) -> None:
    """Makes ``model`` and its config instances of the shrunk class of their family, or of the family's own."""
    is_shrunk = model.config.model_type.startswith(PREFIX)
    if shrunk == is_shrunk:
        return
    kind: Any = SHRUNK[dense_family(model.config)]
    if not shrunk:
        kind = kind.__mro__[2]  # the family's own class, after the mixin
        for name in (SIZES, "auto_map"):
            vars(model.config).pop(name, None)
    vars(model.config).pop("model_type", None)  # a config that was read from a file hides its class's with its own
    model.config.__class__ = kind.config_class
    model.__class__ = kind


def on_meta(layer: nn.Module, config: Any, index: int) -> nn.Module:
    """Returns a block of the same class without weights."""
    kind: Any = type(layer)
    with torch.device("meta"):
        return kind(config, index)


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in layer.named_parameters()}
