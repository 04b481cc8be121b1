"""HeadGroups: fewer key/value groups, each with its queries, by Optimal Brain Surgeon with whole groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from lit_prune.models.linears import PrunableLinear
from lit_prune.shrink.base import UnitMethod
from lit_prune.shrink.units.parts import Part, groups_of
from lit_prune.shrink.units.sizes import PartSizes


@final
@dataclass(frozen=True)
class HeadGroupCounts(PartSizes):
    """The number of key/value groups of each attention."""

    name: ClassVar[str] = "head_groups"
    noun: ClassVar[str] = "key/value groups"
    find: ClassVar[Callable[[Mapping[str, PrunableLinear], Any], Part]] = staticmethod(groups_of)


@final
@dataclass(frozen=True)
class HeadGroups(UnitMethod):
    """Removes the key/value groups that each attention needs least, with their queries, and refits its output.

    The columns of the output's linear that belong to a group are removed together, by the rule of MLPWidth with blocks
    of H^-1: group u costs tr(W_u^T ([H^-1]_uu)^-1 W_u). The linears of queries, keys and values lose rows. Without
    grouped queries, a group is a head. `head_dim` is explicit in the config, and the cache shrinks too.

    Args:
        multiple: Number of which the number of groups is a multiple, unless a block keeps all.
        rounds: Number of rounds; by default one for every group.
        damping: Share of the mean of H's diagonal that is added to it.
        compensate: Whether weights are updated. If not, the score is tr(W_u^T H_uu W_u), the energy of the group's
            output.

    Raises:
        InputError: for a multiple or rounds below 1, or a damping that is not positive.
    """

    multiple: int = 1
    rounds: int = 64
    damping: float = 0.01
    compensate: bool = True

    place: ClassVar[int] = 0
    fewer: ClassVar[frozenset[str]] = frozenset({"heads"})
    sizes_class: ClassVar[type[PartSizes]] = HeadGroupCounts
