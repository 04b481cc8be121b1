"""The folder that a run writes its results to: made late, replaced only when the new run has succeeded."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from lit_prune.errors import InputError
from lit_prune.files import clear_draft

MARKS = ("report.json", "config.yaml", "checkpoints")  # every folder that a run wrote has one of them


class RunFolder:
    """The folder of a run's results; nothing is created before :meth:`claim`.

    Args:
        path: The folder; ``~`` is the user's home.
        overwrite: Replace a folder that exists: it is moved aside when this one is claimed, and deleted when this run
            has succeeded, so that a run that fails loses nothing.
        resume: Continue writing into the folder of the run that is resumed.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.overwrite, self.resume = overwrite, resume
        self._replaced: Path | None = None
        self._made = False

    def holds(self, checkpoint: str | os.PathLike[str] | None) -> bool:
        """Returns whether a checkpoint lies in this folder, so that its run may continue here."""
        return checkpoint is not None and self.path.resolve() in Path(checkpoint).expanduser().resolve().parents

    def check(self) -> None:
        """Checks that the folder can be made, without making anything.

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
        # a folder that is replaced is renamed, which needs permission in its parent
        parent = self.path.absolute().parent if replaced else self.path.absolute()
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or _is_read_only(parent):
            raise InputError(f"`output` must be in a folder that can be written, {parent} cannot.")

    def claim(self) -> None:
        """Makes the folder, after moving one that is to be replaced aside."""
        self.check()
        if self.path.is_dir() and self.overwrite and not self.resume:
            # beside the folder, and not in the system's temporary one: a rename works only within a file system
            aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced-", dir=self.path.absolute().parent))
            self._replaced = aside / self.path.name
            self.path.rename(self._replaced)
        try:
            self._made = not self.resume  # an empty folder counts as made
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError:
            self.give_up()
            raise
        for draft in self.path.rglob(".*.partial-*"):  # what a run that was killed was writing
            clear_draft(draft)

    def finish(self) -> None:
        """Deletes the folder that this one replaced: the run has succeeded."""
        self._made = False
        if self._replaced is not None:
            shutil.rmtree(self._replaced.parent)
            self._replaced = None

    def give_up(self) -> bool:
        """Removes the folder of a failed run, and puts back the one that it replaced; returns whether it did.

        A folder with a model or a checkpoint to continue from stays, as does one that this run did not make. Without
        this the same command, run again, would be refused because the folder exists.
        """
        if not self._made or (self.path / "model").exists() or any(self.path.rglob("*.ckpt")):
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        if self._replaced is not None:
            self._replaced.rename(self.path)
            self._replaced.parent.rmdir()
        self._replaced, self._made = None, False
        return True

    @property
    def replaced(self) -> Path | None:
        """Where the replaced folder is kept until this run has succeeded."""
        return self._replaced


def _is_read_only(folder: Path) -> bool:
    """Tries to write, since to the superuser ``os.access`` reports every folder as writable."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return False
    except OSError:
        return True
