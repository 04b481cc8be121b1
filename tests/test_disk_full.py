"""A disk that takes no more: one clear line, and what was there before is untouched.

The disk is a tmpfs of a few MB where this user may mount one (marked slow), else the operating system's limit on the
size of a file, RLIMIT_FSIZE, which every writer meets in the same place.
"""

import errno
import os
import re
import resource
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_prune.checkpointing.io import AtomicCheckpointIO
from lit_prune.cli.main import main
from lit_prune.errors import InputError
from lit_prune.export.run_folder import RunFolder
from lit_prune.files import atomic_write, disk_error, write_text
from tests.test_kill import command, write_data

LINE = (
    "lit-prune: error: `output` must be on a disk with enough space, .* could not be written: {why}. {kept}; free some"
)
TOO_LARGE, NO_SPACE = "File too large", "No space left on device"
AS_IT_WAS, NOTHING = "The old version is unchanged", "No part of it was kept"
TENSORS = {"weights": torch.zeros(1_000_000)}


@contextmanager
def limit(file_bytes: int) -> Iterator[None]:
    """Lets no file grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    warnings.simplefilter("ignore")
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def under(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix(folder): read for name, read in files.items() if name.startswith(folder)}


def fail(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Runs a verb that fails; returns what it said that was no progress."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code == 2
    return errors(capsys.readouterr().err)


def errors(told: str) -> str:
    assert "Traceback" not in told
    lines = [line for line in told.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, told
    return lines[0]


def save_torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(TENSORS, file)


WRITERS = {
    "text": lambda path: path.write_text("x" * 4_000_000),
    "safetensors": lambda path: save_file(TENSORS, path),
    "torch": save_torch,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_does_not_fit_is_said_in_a_line_and_the_earlier_one_stands(writer: str, tmp_path: Path) -> None:
    target = tmp_path / "file"
    for before, kept in ((False, NOTHING), (True, AS_IT_WAS)):
        if before:
            write_text(target, "earlier")
        told = f"`output` must be on a disk with enough space, .* could not be written: {TOO_LARGE}. {kept}; free"
        with pytest.raises(InputError, match=told), limit(100_000), atomic_write(target) as draft:
            WRITERS[writer](draft)
    assert everything(tmp_path) == {"file": b"earlier"}


def test_only_what_a_disk_refuses_is_said_so(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        assert disk_error(OSError(number, "any")) == os.strerror(number)
    for error in (OSError(errno.ENOENT, "any"), OSError("any"), RuntimeError("28"), InputError("any")):
        assert disk_error(error) is None
    with pytest.raises(PermissionError), atomic_write(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "any")


def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with limit(100_000), pytest.raises(InputError, match=f"last.ckpt could not be written: {TOO_LARGE}. {AS_IT_WAS}"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, **TENSORS}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_folder_that_cannot_be_made_leaves_what_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "report.json", "{}")
    (tmp_path / "run").mkdir()
    write_text(tmp_path / "run" / "report.json", "{}")
    make = Path.mkdir

    def full(path: Path, *args: int, **fields: bool) -> None:
        if path.name == "run":
            raise OSError(errno.ENOSPC, NO_SPACE)
        make(path, *args, **fields)

    before = everything(tmp_path)
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match=NO_SPACE):
        RunFolder(tmp_path / "run", overwrite=True).claim()
    assert everything(tmp_path) == before


def test_a_command_whose_disk_is_full(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export and prune over what was there: the old model and the old folder are untouched."""
    fit = command("run", "--trainer.max_steps=1")[3:]
    main(fit)
    before = everything(here)
    with limit(1_000_000):
        told = fail(capsys, "export", "--output=run", "--ckpt_path=last", "--overwrite")
        assert_line(told, TOO_LARGE, AS_IT_WAS)
        assert everything(here) == before
        told = fail(capsys, "prune", "--config=run/config.yaml", "--output=run", "--overwrite")
        assert_line(told, TOO_LARGE, NOTHING)
        assert everything(here) == before
        told = fail(capsys, *command("other", "--trainer.max_steps=1")[3:])
        assert_line(told, TOO_LARGE, NOTHING)
    assert everything(here / "run") == under("run/", before)
    assert not list((here / "other").rglob("*.ckpt"))


def assert_line(told: str, why: str, kept: str) -> None:
    assert re.search(LINE.format(why=why, kept=kept), told), told


@pytest.fixture
def disk(here: Path) -> Iterator[Path]:
    """A disk of 48 MB."""
    folder = here / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a tmpfs; the tests with RLIMIT_FSIZE stand in for it")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # opened weights are still mapped


def fill(folder: Path, leave_bytes: int) -> None:
    """Takes all of a disk but so many bytes."""
    free = os.statvfs(folder)
    (folder / "filler").write_bytes(b"0" * (free.f_bavail * free.f_frsize - leave_bytes))


@pytest.mark.slow
def test_a_disk_that_is_full(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fills up while a run is going on, at its checkpoint and at its export; goes on when there is room again."""
    run = disk / "run"
    main(command(str(run), "--trainer.max_steps=2")[3:])
    fill(disk, 1_000_000)
    before = everything(run)
    assert_line(fail(capsys, "export", f"--output={run}", "--ckpt_path=last", "--overwrite"), NO_SPACE, AS_IT_WAS)
    assert everything(run) == before
    longer = [*command(str(run), "--trainer.max_steps=3")[3:], "--ckpt_path=last"]
    assert_line(fail(capsys, *longer), NO_SPACE, AS_IT_WAS)
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before["checkpoints/last.ckpt"]
    assert under("model/", before) == everything(run / "model")
    (disk / "filler").unlink()
    main(longer)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
