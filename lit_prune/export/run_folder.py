"""The folder that a run writes into: claimed late, each thing in it written aside and renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from lit_prune.errors import InputError
from lit_prune.files import clear_draft

MARKS = ("report.json", "config.yaml", "checkpoints")  # one of them is in every folder that a run wrote


class RunFolder:
    """Where a run's results go; nothing is created before :meth:`claim`.

    Args:
        path: The folder.
        overwrite: Replace a folder that exists: it is moved aside when this one is claimed, and deleted when this run
            is through, so that a run that fails loses nothing.
        resume: Go on writing into the folder of the run that is resumed.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> None:
        self.path = Path(path)
        self.overwrite, self.resume = overwrite, resume
        self._replaced: Path | None = None

    def holds(self, checkpoint: str | os.PathLike[str] | None) -> bool:
        """Returns whether a checkpoint lies in this folder, so that its run may go on here."""
        return checkpoint is not None and self.path.resolve() in Path(checkpoint).resolve().parents

    def check(self) -> None:
        """Asks whether the folder can be made, and makes nothing.

        Raises:
            InputError: if it exists and may not be replaced, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"`output` must be a folder, {self.path} is a file.")
        replaced = self.path.is_dir() and any(self.path.iterdir()) and not self.resume
        if replaced and not self.overwrite:
            raise InputError(
                f"`output` must be a new folder, {self.path} exists: choose another with `--output DIR`, or replace it "
                "with `--overwrite`."
            )
        if replaced and not any((self.path / mark).exists() for mark in MARKS):
            raise InputError(f"`overwrite` replaces only what a run wrote, {self.path} has none of {', '.join(MARKS)}.")
        if replaced and (self.path.is_mount() or self.path.resolve() == Path.cwd()):
            raise InputError(f"`overwrite` cannot move {self.path} aside, it is in use; choose another `--output DIR`.")
        parent = self.path.absolute().parent if replaced else self.path.absolute()
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or _read_only(parent):
            raise InputError(f"`output` must be in a folder that can be written, {parent} cannot.")

    def claim(self) -> None:
        """Makes the folder; one that is to be replaced is moved aside."""
        self.check()
        if self.path.is_dir() and self.overwrite and not self.resume:
            aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced-", dir=self.path.absolute().parent))
            self._replaced = aside / self.path.name
            self.path.rename(self._replaced)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError:
            self.give_up()
            raise
        for draft in self.path.rglob(".*.partial-*"):  # what a run that was killed was writing
            clear_draft(draft)

    def finish(self) -> None:
        """Deletes the folder that this one replaced."""
        if self._replaced is not None:
            shutil.rmtree(self._replaced.parent)
            self._replaced = None

    def give_up(self) -> None:
        """Puts the folder that this one replaced back, unless this one has a model or a checkpoint to go on from."""
        if self._replaced is None or (self.path / "model").exists() or any(self.path.rglob("*.ckpt")):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self._replaced.rename(self.path)
        self._replaced.parent.rmdir()
        self._replaced = None

    @property
    def replaced(self) -> Path | None:
        """Where the folder is that this one replaces, until this run is through."""
        return self._replaced


def _read_only(folder: Path) -> bool:
    """Tries it: for the superuser every folder looks writable."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return False
    except OSError:
        return True
