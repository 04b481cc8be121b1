"""What is told in the folder, whatever the picture makes of it."""

import json
from pathlib import Path

import pytest

from lit_prune.errors import InputError
from lit_prune.report import write
from tests.report.test_report import REPORT


def refuse(error: Exception) -> None:
    raise error


def test_a_picture_that_cannot_be_drawn_costs_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "lit_prune.report.report.picture", lambda *args: refuse(OverflowError("too large\nfor an axis"))
    )
    assert write._told(tmp_path, REPORT) == [tmp_path / "report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["parameters"] == REPORT["parameters"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert "blocks.png could not be drawn: too large" in capsys.readouterr().err.replace("\n", "")


def test_a_picture_that_the_disk_does_not_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_prune.report.report.picture", lambda *args: refuse(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="could not be written: No space left on device"):
        write._told(tmp_path, REPORT)
    assert (tmp_path / "report.json").is_file()
