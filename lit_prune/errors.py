"""The exception for mistakes of the user, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A mistake of the user. Its message has the field, the rule and the remedy; the command prints no traceback."""


def near_misses(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """Returns up to ``count`` of ``choices`` that are most similar to ``word``, best first; case is ignored.

    >>> near_misses("wnda", ["Magnitude", "Wanda"])
    ['Wanda']
    """
    by_lower = {choice.lower(): choice for choice in choices}
    return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, n=count, cutoff=0.6)]


def unknown_choice(field: str, got: str, choices: Iterable[str]) -> InputError:
    """Returns the error for a name that is not one of ``choices``; its message lists them and suggests near misses."""
    choices = sorted(choices)
    near = near_misses(got, choices)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return InputError(f"`{field}` must be one of {', '.join(choices)}, got {got!r}.{hint}")


def described(value: object) -> str:
    """Returns a value that is no object of ours for an error: the class Wanda, or 'Wanda'."""
    return f"the class {value.__name__}" if isinstance(value, type) else repr(value)
