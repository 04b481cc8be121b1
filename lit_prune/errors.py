"""The one exception for what a user can put right; its message is shown alone, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A user's mistake, told in a line that names the field, the rule and the remedy."""


def near_misses(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """Returns up to ``count`` of ``choices`` that look most like ``word``, best first, whatever the case.

    >>> near_misses("wnda", ["Magnitude", "Wanda"])
    ['Wanda']
    """
    by_lower = {choice.lower(): choice for choice in choices}
    return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, n=count, cutoff=0.6)]


def unknown(field: str, got: str, choices: Iterable[str]) -> InputError:
    """Returns the error for a name that is not one of ``choices``: near misses first, then the whole list."""
    choices = sorted(choices)
    near = near_misses(got, choices)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return InputError(f"`{field}` must be one of {', '.join(choices)}, got {got!r}.{hint}")
