"""Progress bars on stderr, or a single line each where stderr is no terminal; of several processes one prints."""

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
    if distributed.is_rank_zero():
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def track(items: Iterable[Item], label: str, note: Callable[[], str] | None = None) -> Iterator[Item]:
    """Yields ``items`` under a progress bar; without a terminal prints one line when the work begins.

    Args:
        items: The items.
        label: Text of the bar.
        note: Returns a text about the last item, which the bar shows behind its label.
    """
    total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    if not distributed.is_rank_zero():
        yield from items
        return
    if not console.is_terminal:
        console.print(f"{label} ...", highlight=False, markup=False)
        yield from items
        return
    with _bar() as bar:
        task = bar.add_task(label, total=total)
        for item in items:
            yield item
            bar.update(task, advance=1, description=label if note is None else f"{label}, {note()}")


@contextmanager
def counted(total: int, label: str) -> Iterator[Callable[[int, str], None]]:
    """Gives a function that sets a progress bar to a count and a text; without a terminal prints one line.

    Args:
        total: The count at which the bar is full.
        label: Text of the bar, to which the function appends its own.
    """
    if not console.is_terminal:
        console.print(f"{label} ...", highlight=False, markup=False)
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
