"""Progress bars on stderr, or a line a minute where it is no terminal; of several processes one prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lit_prune import distributed

SECONDS = 60.0  # between the lines of long work, without a terminal
Item = TypeVar("Item")
Progressed = Callable[[int, str], None]  # sets the number of items that are done, and the text about the last one
console = Console(stderr=True)
_told: set[str] = set()  # lines that are printed once


def log(text: str, *, once: bool = False) -> None:
    """Prints a line beside the progress bars; with ``once`` not again what the process has printed so before."""
    if once and text in _told:
        return
    if once:
        _told.add(text)
    if distributed.is_rank_zero():
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def track(items: Iterable[Item], label: str, note: Callable[[], str] | None = None) -> Iterator[Item]:
    """Yields ``items`` under a progress bar; without a terminal prints a line at first, and then at most one a minute.

    Args:
        items: The items.
        label: Text of the bar.
        note: Returns a text about the last item, which the bar shows behind its label.
    """
    if not distributed.is_rank_zero():
        yield from items
        return
    try:
        total = len(items)  # type: ignore[arg-type]
    except TypeError:  # also of a DataLoader over an IterableDataset, which has the method
        total = None
    with counted(total, label) as progressed:
        for done, item in enumerate(items, 1):
            yield item
            progressed(done, "" if note is None else note())


@contextmanager
def counted(total: int | None, label: str) -> Iterator[Progressed]:
    """Gives a function that sets a progress bar to a count and a text; without a terminal prints lines.

    Args:
        total: The count at which the bar is full, if it is known.
        label: Text of the bar, to which the function appends its own.
    """
    if not console.is_terminal:
        log(f"{label} ...")
        yield _lines(total, label)
        return
    with _bar() as bar:
        task = bar.add_task(label, total=total)
        yield lambda done, text: bar.update(task, completed=done, description=", ".join(filter(None, (label, text))))


def _lines(total: int | None, label: str) -> Progressed:
    """Returns a function that prints how far the work is, at most once a minute."""
    start = last = time.monotonic()

    def progressed(done: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS or done == total:
            return
        last = now
        minutes, seconds = divmod(int(now - start), 60)
        count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        log(", ".join(filter(None, (f"{label}: {count} in {minutes}:{seconds:02}", text))))

    return progressed


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)
