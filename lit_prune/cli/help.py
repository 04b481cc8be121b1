"""The ``--help`` of a verb: the groups of this project first, the Trainer's last, in plain text."""

from __future__ import annotations

import re
from argparse import Action
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from lit_prune.cli.signatures import GROUPS


class PlainHelp(DefaultHelpFormatter):
    """jsonargparse's formatter without the Sphinx markup of Lightning's docstrings."""

    def _expand_help(self, action: Action) -> str:
        return plain(super()._expand_help(action))


def plain(text: str) -> str:
    """Returns ``text`` without Sphinx markup, and without defaults in prose: jsonargparse appends the real ones.

    >>> plain("A :class:`~datetime.timedelta` or ``None``. Default: ``None``. (default: null)")
    'A timedelta or None. (default: null)'
    """
    text = re.sub(r"\s*Defaults?(?: to)?:? ``[^`]*``\.?", "", text)
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?([^`]+)`", r"\1", text)
    text = re.sub(r"\.\. (\w+)::", lambda match: f"{match[1].capitalize()}:", text)
    return text.replace("``", "")


def arrange(parser: ArgumentParser, verb: str) -> None:
    """Sorts the groups of options, the Trainer's last, and shortens the usage line."""
    parser.usage = f"lit-prune {verb} [--config FILE] [options]"
    groups: Any = parser._action_groups  # argparse prints them in this order; it has no public way to set it
    groups.sort(key=lambda group: _position([action.dest for action in group._group_actions]))


def _position(names: list[str]) -> int:
    """Returns where a group of options stands: general ones first, then in the order of GROUPS."""
    groups = {name.split(".")[0] for name in names if "." in name}
    return max((list(GROUPS).index(group) + 1 for group in groups if group in GROUPS), default=0)
