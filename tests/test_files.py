"""Files and folders appear whole or not at all, readable as the umask says; a full disk is reported in one line."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_prune.errors import InputError
from lit_prune.files import atomic_write, cache_error, clear_draft, disk_error, write_text


def test_atomic_write_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_write(target) as draft:
        draft.mkdir()
        (draft / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(RuntimeError, match="broken"), atomic_write(target) as draft:  # noqa: PT012
        draft.mkdir()
        raise RuntimeError("broken")
    assert os.listdir(tmp_path) == ["model"]
    assert (target / "a").read_text() == "1"
    with atomic_write(target) as draft:
        draft.mkdir()
    assert os.listdir(target) == []
    assert os.listdir(tmp_path) == ["model"]


def test_an_interrupt_between_two_names_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "model"
    target.mkdir()
    for renames, left in (("rename", "old"), ("replace", "new")):
        (target / "a").write_text("old")
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch, atomic_write(target) as draft:  # noqa: PT012
            draft.mkdir()
            (draft / "a").write_text("new")
            patch.setattr(Path, renames, interrupt)
        assert os.listdir(tmp_path) == ["model"]
        assert (target / "a").read_text() == left


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_what_safetensors_keeps_to_itself_is_open_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        for target in (tmp_path / "statistics.safetensors", tmp_path / "model"):
            with atomic_write(target) as draft:
                if target.suffix == "":
                    draft.mkdir()
                save_file({"weight": torch.zeros(1)}, draft if target.suffix else draft / "model.safetensors")
    finally:
        os.umask(before)
    for written in tmp_path.rglob("*.safetensors"):
        assert stat.S_IMODE(written.stat().st_mode) == mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "statistics.safetensors"]


def test_a_text_is_replaced(tmp_path: Path) -> None:
    for text in ("old", "n\u00e4w"):
        write_text(tmp_path / "report.json", text)
    assert (tmp_path / "report.json").read_bytes() == b"n\xc3\xa4w"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_draft_that_was_whole_gets_its_name_and_a_half_one_is_deleted(tmp_path: Path) -> None:
    half, whole = tmp_path / ".half.partial-a", tmp_path / ".whole.partial-b"
    for folder in (half / "half", whole / "whole", whole / "replaced"):
        folder.mkdir(parents=True)
    (whole / "whole" / "a").write_text("new")
    clear_draft(half)
    clear_draft(whole)
    assert os.listdir(tmp_path) == ["whole"]
    assert (tmp_path / "whole" / "a").read_text() == "new"


def test_a_disk_that_is_full_is_one_line(tmp_path: Path) -> None:
    message = (
        r"`output` must be on a disk with enough space, .* could not be written: No space left.*No part of it was kept"
    )
    with pytest.raises(InputError, match=message), atomic_write(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "any")
    message = r"File too large. The old version is unchanged; free some space, or choose another `--output"
    with pytest.raises(InputError, match=message), atomic_write(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: File too large (os error 27)")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_a_disk_are_told_from_others() -> None:
    chained = RuntimeError("of a library")
    chained.__cause__ = OSError(errno.EROFS, "any")
    assert disk_error(chained) == "Read-only file system"
    assert disk_error(FileNotFoundError(errno.ENOENT, "any")) is None
    assert disk_error(ValueError("any")) is None


@pytest.mark.parametrize("name", ["home", "home/datasets/text", "."])
def test_a_cache_that_cannot_be_written_to(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    wrapped = RuntimeError("while building")
    wrapped.__cause__ = OSError(errno.EROFS, "any", str(tmp_path / name))
    message = rf"`HF_HOME`, .*: {(tmp_path / name).resolve()} cannot \(Read-only file system\)"
    with pytest.raises(InputError, match=message):
        raise cache_error(wrapped) or wrapped
    assert cache_error(OSError(errno.EROFS, "any", str(tmp_path / "another" / "file"))) is None
    assert cache_error(OSError(errno.ENOENT, "any", str(tmp_path / "home"))) is None
    assert cache_error(ValueError(str(tmp_path / "home"))) is None
