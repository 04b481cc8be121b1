"""Lines and bars on stderr."""

import io
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader, IterableDataset

from lit_prune import progress


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> io.StringIO:
    """The output of the console, with and without a terminal."""
    text = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=text, force_terminal=request.param, width=100))
    return text


@pytest.mark.parametrize("printed", [False], indirect=True)
def test_without_a_terminal_work_begins_with_a_line(printed: io.StringIO) -> None:
    assert list(progress.track([1, 2], "Blocks")) == [1, 2]
    with progress.counted(10, "Search") as advance:
        advance(5, "loss 3.2")
    progress.log("Done with [brackets].")
    assert printed.getvalue() == "Blocks ...\nSearch ...\nDone with [brackets].\n"


@pytest.mark.parametrize("printed", [False], indirect=True)
def test_without_a_terminal_long_work_has_a_line_every_minute(
    printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0, 59, 65, 66, 124, 126, 300])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    losses = iter(["loss 3.1", "loss 3.2", "loss 3.3", "loss 3.4", "loss 3.5", "loss 3.6"])
    assert list(progress.track(range(6), "Blocks", lambda: next(losses))) == list(range(6))
    assert printed.getvalue() == "Blocks ...\nBlocks: 2 of 6 in 1:05, loss 3.2\nBlocks: 5 of 6 in 2:06, loss 3.5\n"


@pytest.mark.parametrize("printed", [True], indirect=True)
def test_a_terminal_has_bars(printed: io.StringIO) -> None:
    assert list(progress.track([1, 2], "Blocks")) == [1, 2]
    with progress.counted(10, "Search") as advance:
        advance(5, "loss 3.2")
    assert list(progress.track([1, 2], "Pruning", lambda: "loss 0.4")) == [1, 2]
    assert "Pruning, loss 0.4" in printed.getvalue()
    assert "2/2" in printed.getvalue()
    assert "Search, loss 3.2" in printed.getvalue()
    assert "5/10" in printed.getvalue()


@pytest.mark.parametrize("printed", [False], indirect=True)
def test_other_processes_print_nothing(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_prune.progress.distributed.is_rank_zero", lambda: False)
    assert list(progress.track([1, 2], "Blocks")) == [1, 2]
    progress.log("Done.")
    assert printed.getvalue() == ""


@pytest.mark.parametrize("printed", [False], indirect=True)
def test_a_line_that_is_printed_once(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_told", set())
    for text in ("Few tokens.", "Few tokens.", "Other."):
        progress.log(text, once=True)
    assert printed.getvalue() == "Few tokens.\nOther.\n"


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(3))


@pytest.mark.parametrize("printed", [False, True], indirect=True)
def test_items_of_unknown_number(printed: io.StringIO) -> None:
    batches: DataLoader[torch.Tensor] = DataLoader(Endless(), batch_size=None)
    assert list(map(int, progress.track(batches, "Batches"))) == [0, 1, 2]
    assert "Batches" in printed.getvalue()
