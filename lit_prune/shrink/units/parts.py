"""The parts of a block that can be made smaller: the channels of its MLP, and the key/value groups of its attention.

A part consists of units. Readers are linears whose rows belong to the units, and the writer is the linear whose columns
do: removing a unit removes its rows from the readers and its columns from the writer.
Suffixes: U units, R rows of one unit, K columns of one unit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_prune.models.linears import ExpertSlice, PrunableLinear
from lit_prune.models.remote_code.modeling_shrunk import LayerConfig


@dataclass(frozen=True)
class Layout:
    """The names of the linears of an MLP, which share a parent.

    Attributes:
        readers: The linears whose rows are channels.
        writer: The linear whose columns are channels.
        stacked: Number of times that the channels are in each reader, one after the other.
    """

    readers: tuple[str, ...]
    writer: str
    stacked: int = 1


MLP_LAYOUTS = (
    Layout(("gate_proj", "up_proj"), "down_proj"),
    Layout(("gate_up_proj",), "down_proj", stacked=2),
    Layout(("up_proj",), "down_proj"),
    Layout(("w1", "w3"), "w2"),
    Layout(("dense_h_to_4h",), "dense_4h_to_h"),
    Layout(("c_fc",), "c_proj"),
    Layout(("fc1",), "fc2"),
    Layout(("fc_in",), "fc_out"),
)
ATTENTION_WRITERS = ("o_proj", "dense", "out_proj")
WIDTH_FIELDS = ("ffn_dim", "ffn_hidden_size", "n_inner", "intermediate_size")


@dataclass(frozen=True)
class Part:
    """The units of one block, and the linears that they are rows and columns of.

    Attributes:
        rows: For each reader, by its name within the block, the rows of every unit, shape (U, R).
        writer: Name of the writer.
        columns_UK: The columns of the writer that belong to every unit.
        fields: The fields of the config that have the number of units, each with its value per unit.
        fixed: Fields that the config must have explicitly, because their defaults depend on ``fields``.
    """

    rows: Mapping[str, Tensor]
    writer: str
    columns_UK: Tensor
    fields: Mapping[str, int]
    fixed: Mapping[str, int]

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.columns_UK)

    def sizes(self, units: int) -> dict[str, int]:
        """Returns the fields of the config of a block with this number of units."""
        return {name: units * per_unit for name, per_unit in self.fields.items()} | dict(self.fixed)


class NoPart(Exception):
    """The block has no such part; the message says why."""


def mlp_of(linears: Mapping[str, PrunableLinear], config: Any) -> Part:
    """Returns the channels of the MLP of a block.

    Args:
        linears: The linears of the block, by name.
        config: The config of the block.

    Raises:
        NoPart: for a mixture of experts, an MLP of an unknown layout, or a config without a field for its width.
    """
    _check_experts(linears)
    for layout in MLP_LAYOUTS:
        for name in linears:
            parent = name.removesuffix(layout.writer)
            if parent + layout.writer != name or not (parent == "" or parent.endswith(".")):
                continue
            readers = [parent + reader for reader in layout.readers]
            if all(reader in linears for reader in readers):
                width = linears[name].weight_OI.shape[1]
                rows_UR = torch.arange(width * layout.stacked).view(layout.stacked, width).T
                field = _width_field(config, width)
                columns_UK = torch.arange(width)[:, None]
                return Part(dict.fromkeys(readers, rows_UR), name, columns_UK, {field: 1}, {})
    raise NoPart(f"no MLP of a known layout is among its linears, {_names(linears)}")


def groups_of(linears: Mapping[str, PrunableLinear], config: Any) -> Part:
    """Returns the key/value groups of the attention of a block, each with its queries.

    Args:
        linears: The linears of the block, by name.
        config: The config of the block.

    Raises:
        NoPart: for an attention of an unknown layout.
    """
    if getattr(config, "num_kv_shared_layers", 0):
        raise NoPart("its blocks share keys and values")
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    separate, fused = _one(linears, "q_proj"), _one(linears, "qkv_proj")
    writer = next((name for suffix in ATTENTION_WRITERS if (name := _one(linears, suffix))), None)
    if writer is None or not (separate or fused):
        raise _no_groups(linears)
    width = linears[writer].weight_OI.shape[1]
    head_dim, per_group = width // heads, heads // groups
    queries_UK = torch.arange(width).view(groups, per_group * head_dim)
    keys_UK = torch.arange(groups * head_dim).view(groups, head_dim)
    if separate:
        parent = separate.removesuffix("q_proj")
        rows = {separate: queries_UK, f"{parent}k_proj": keys_UK, f"{parent}v_proj": keys_UK}
        if not rows.keys() <= linears.keys():
            raise _no_groups(linears)
    else:
        assert fused is not None
        rows = {fused: torch.cat([queries_UK, width + keys_UK, width + groups * head_dim + keys_UK], dim=1)}
    fields = {"num_attention_heads": per_group, "num_key_value_heads": 1}
    return Part(rows, writer, queries_UK, fields, {"head_dim": head_dim})


def _no_groups(linears: Collection[str]) -> NoPart:
    """Returns the reason for an attention of an unknown layout."""
    if _one(linears, "query_key_value") or _one(linears, "c_attn"):  # Falcon, GPT-2, GPT-NeoX and the like
        return NoPart("its config has no field for the width of a head: the heads always fill the hidden size")
    return NoPart(f"no attention of a known layout is among its linears, {_names(linears)}")


def _check_experts(linears: Mapping[str, PrunableLinear]) -> None:
    if any(isinstance(linear, ExpertSlice) or "experts." in name for name, linear in linears.items()):
        raise NoPart("its MLPs are mixtures of experts")


def _width_field(config: Any, width: int) -> str:
    """The field of the config that has the width of the MLP, or None for the family's default."""
    names = [name for name in WIDTH_FIELDS if getattr(config, name, 0) in (width, None)]
    if not names:
        raise NoPart(f"its config has no field with the {width} channels of its MLP")
    exact = (name for name in names if getattr(config, name) == width)
    return next((name for name in names if _declares(config, name)), next(exact, names[0]))


def _declares(config: Any, name: str) -> bool:
    """Whether the class of a config has the field, which that of custom code may not.

    Instances keep whatever else is in a config.json.
    """
    while isinstance(config, LayerConfig):
        config = config.shared
    return hasattr(type(config), name)


def _one(linears: Collection[str], suffix: str) -> str | None:
    """The only one of the names that ends with ``suffix``; None if there is none or more than one."""
    names = [name for name in linears if name == suffix or name.endswith(f".{suffix}")]
    return names[0] if len(names) == 1 else None


def _names(names: Sequence[str] | Collection[str]) -> str:
    return ", ".join(names)
