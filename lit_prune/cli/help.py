"""Formatting of a verb's ``--help``: plain text, this project's groups of options first, the Trainer's last."""

from __future__ import annotations

import re
from argparse import Action
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from lit_prune.cli.signatures import GROUPS, summary


class PlainHelp(DefaultHelpFormatter):
    """jsonargparse's formatter without the Sphinx markup of Lightning's docstrings."""

    def _expand_help(self, action: Action) -> str:
        return plain(super()._expand_help(action))


def plain(text: str) -> str:
    """Returns ``text`` without Sphinx markup, and without defaults in prose, since jsonargparse appends the real ones.

    >>> plain("A :class:`~datetime.timedelta` or ``None``. Default: ``None``. (default: null)")
    'A timedelta or None. (default: null)'
    """
    text = re.sub(r"\s*Defaults?(?: to)?:? ``[^`]*``\.?", "", text)
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?([^`]+)`", r"\1", text)
    text = re.sub(r"\.\. (\w+)::", lambda match: f"{match[1].capitalize()}:", text)
    return text.replace("``", "")


def arrange(parser: ArgumentParser, verb: str) -> None:
    """Sorts the groups of options, the Trainer's last, shortens the usage line and titles the verb's own options."""
    parser.usage = f"lit-prune {verb} [--config FILE] [options]"
    groups: Any = parser._action_groups  # argparse prints them in this order; it has no public way to set it
    groups.sort(key=lambda group: _position([action.dest for action in group._group_actions]))
    for group in groups:  # LightningCLI titles them with the verb's summary, which the help opens with already
        if str(group.title).rstrip(".") == summary(verb).rstrip("."):
            group.title = f"options of {verb}"


def _position(names: list[str]) -> int:
    """Returns the position of a group of options: general ones first, then in the order of GROUPS."""
    groups = {name.split(".")[0] for name in names if "." in name}
    return max((list(GROUPS).index(group) + 1 for group in groups if group in GROUPS), default=0)
