"""Progress bars on long work, drawn where somebody may be watching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
console = Console(stderr=True)


def say(text: str) -> None:
    """Prints a line beside the progress bars."""
    console.print(text, highlight=False, soft_wrap=True)


def track(items: Iterable[Item], label: str) -> Iterator[Item]:
    """Yields ``items`` under a progress bar on stderr; without a terminal one line tells that the work begins."""
    total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    if not console.is_terminal:
        console.print(f"{label} ...", highlight=False)
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield from bar.track(items, total=total, description=label)
