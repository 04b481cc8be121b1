"""Progress bars on long work, drawn where somebody may be watching; of several processes the first one draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lit_prune import distributed

Item = TypeVar("Item")
console = Console(stderr=True)


def log(text: str) -> None:
    """Prints a line beside the progress bars."""
    if distributed.first():
        console.print(text, highlight=False, soft_wrap=True)


def track(items: Iterable[Item], label: str) -> Iterator[Item]:
    """Yields ``items`` under a progress bar on stderr; without a terminal one line tells that the work begins."""
    total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    if not distributed.first():
        yield from items
        return
    if not console.is_terminal:
        console.print(f"{label} ...", highlight=False)
        yield from items
        return
    with _bar() as bar:
        yield from bar.track(items, total=total, description=label)


@contextmanager
def counted(total: int, label: str) -> Iterator[Callable[[int, str], None]]:
    """Gives a function that moves a progress bar on to a number and says how things stand; a line without a terminal.

    Args:
        total: The number at which the bar is full.
        label: What the bar says before that.
    """
    if not console.is_terminal:
        console.print(f"{label} ...", highlight=False)
        yield lambda done, text: None
        return
    with _bar() as bar:
        task = bar.add_task(label, total=total)
        yield lambda done, text: bar.update(task, completed=done, description=f"{label}, {text}")


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)
