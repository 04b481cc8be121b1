"""The number of experts that a router needs."""

from __future__ import annotations

from typing import Any

from torch import nn


def picked_experts(layer: nn.Module) -> int:
    """Returns the number of experts that the router of a block picks for a token; 0 if it does not say."""
    values = [vars(module).get("top_k") for module in layer.modules()]
    return max((value for value in values if type(value) is int), default=0)


def groups_of_router(config: Any) -> int:
    """Returns the number of groups of neighbouring experts from which a router picks some first, as in DeepSeek-V3."""
    return getattr(config, "n_group", None) or 1


def fewest_experts(config: Any, picked: int, multiple: int) -> int:
    """Returns the smallest multiple that leaves the router enough experts.

    Of a router that picks 2 experts it is 2. If it picks 8 in 4 of 8 groups, which DeepSeek-V3 ranks by their best two
    experts, each group has 2, and it is 16.

    Args:
        config: The config of a mixture.
        picked: Number of experts that the router picks for a token.
        multiple: Number of which the number of experts is a multiple.
    """
    groups = groups_of_router(config)
    if groups > 1:
        picked = groups * max(2, -(-picked // (config.topk_group or groups)))
    return multiple * -(-picked // multiple)
