"""The measured losses of a search, in a file from which an interrupted search resumes.

A search is deterministic given its seed and the losses. A resumed search therefore starts from the beginning, takes the
losses from the file, and measures only those that are not in it. The file is JSON; its key identifies the model, the
text and the settings that the losses belong to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_prune.errors import InputError
from lit_prune.files import write_text
from lit_prune.search.space import Point

DIGEST = 64  # length of a SHA-256, which is not worth printing
CHANGE = "choose another file by `--pruning.allocation.state FILE`"


class MeasuredLosses:
    """The losses by point of the search space and window.

    Args:
        path: The file; None keeps the losses in memory.
        name: Name of the setting, for errors.

    Attributes:
        key: What the losses in the file depend on; None without a file.
        losses: The losses by point and window.
        mixtures: The loss of each mixture of which the search took one as its start, by name.

    Raises:
        InputError: if the file was not written by a search, or its folder does not exist.
    """

    def __init__(self, path: str | None, name: str = "Search.state") -> None:
        self.name = name
        self.path = None if path is None else Path(path)
        self.key: dict[str, Any] | None = None
        self.losses: dict[tuple[Point, int], float] = {}
        self.mixtures: dict[str, float] = {}
        self._saved = 0, 0
        if self.path is None:
            return
        if self.path.exists():
            self._read(self.path)
        elif not self.path.absolute().parent.is_dir():
            raise InputError(f"`{self.name}` must be a file in a folder that exists, got {path}: make it, or {CHANGE}.")

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            losses = {(tuple(moved), window): loss for window, loss, moved in content["losses"]}
            self.key, self.losses = dict(content["key"]), losses
            self.mixtures = dict(content.get("mixtures", {}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"`{self.name}` must be a file that a search wrote, {path} is not; {CHANGE}.") from error
        self._saved = self._count

    @property
    def whereabouts(self) -> str:
        """Where the measurements of an interrupted search are, and how to resume it, as a clause."""
        if self.path is None:
            return "its measurements are lost; pass `--pruning.allocation.state FILE` to be able to resume it"
        return f"its measurements are in {self.path}, and the same command resumes it"

    @property
    def _count(self) -> tuple[int, int]:
        return len(self.losses), len(self.mixtures)

    def check_key(self, key: Mapping[str, Any]) -> None:
        """Checks that the losses belong to the search of ``key``, which may have only some of the entries.

        Raises:
            InputError: if entries differ from those of the file, with the differences.
        """
        expected = json.loads(json.dumps(key))  # as it would be in the file: tuples become lists
        if self.key is None:
            return
        if not self.losses:  # but those of mixtures, which are compared before the search has a space
            expected = {name: value for name, value in expected.items() if name in self.key}
        differing = [_difference(name, self.key.get(name), value) for name, value in expected.items()]
        if differences := [text for text in differing if text]:
            raise InputError(
                f"`{self.name}` must be of the same search, {self.path} is of another: {'; '.join(differences)}. "
                f"Change it back, or {CHANGE}."
            )

    def save(self, key: Mapping[str, Any], rates: list[float]) -> None:
        """Writes the file if there are new losses; ``rates``, the best so far, are only for people to read."""
        if self.path is None or self._count == self._saved:
            return
        losses = [[window, loss, list(moved)] for (moved, window), loss in self.losses.items()]
        content = {"key": dict(key), "rates": rates, "losses": losses}
        if self.mixtures:
            content["mixtures"] = self.mixtures
        write_text(self.path, json.dumps(content) + "\n")
        self._saved = self._count


def _difference(name: str, then: Any, now: Any) -> str:
    """The difference of two values as text, empty if they are equal."""
    if then == now:
        return ""
    if isinstance(now, dict) and isinstance(then, dict):
        return "; ".join(filter(None, (_difference(f"{name} {part}", then.get(part), now.get(part)) for part in now)))
    if (isinstance(now, str) and len(now) == DIGEST) or isinstance(now, list):
        return f"other {name}"
    return f"`{name}` {then}, now {now}"
