"""The folder of a run's results. It is created late, and replaces an earlier one only after the run has succeeded."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from lit_prune.errors import InputError
from lit_prune.files import clear_draft

MARKERS = ("report.json", "config.yaml", "checkpoints")  # every folder that a run wrote has one of them


class RunFolder:
    """The folder of a run's results; nothing is created before :meth:`claim`.

    Args:
        path: The folder; ``~`` is the user's home.
        overwrite: Replace an existing folder. It is moved aside by :meth:`claim` and deleted by :meth:`finish`, so that
            a run that fails loses nothing.
        resume: Write into the existing folder of the run that is resumed.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.overwrite, self.resume = overwrite, resume
        self._replaced: Path | None = None
        self._created = False

    def holds(self, checkpoint: str | os.PathLike[str] | None) -> bool:
        """Returns whether a checkpoint is in this folder, whose run may then continue here."""
        return checkpoint is not None and self.path.resolve() in Path(checkpoint).expanduser().resolve().parents

    def check(self) -> None:
        """Checks that the folder can be created, without creating anything.

        Raises:
            InputError: if it exists and may not be replaced, or if it cannot be written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"`output` must be a folder, got the file {self.path}.")
        replaced = self.path.is_dir() and any(self.path.iterdir()) and not self.resume
        if replaced and not self.overwrite:
            stopped = (self.path / "checkpoints" / "last.ckpt").exists() and not (self.path / "model").exists()
            hint = " The fit in it did not finish: `--ckpt_path last` continues it." if stopped else ""
            raise InputError(
                f"`output` must be a new folder, got {self.path}, which exists: choose another with `--output DIR`, or "
                f"replace it with `--overwrite`.{hint}"
            )
        if replaced and not any((self.path / marker).exists() for marker in MARKERS):
            raise InputError(
                f"`overwrite` replaces only the folder of a run, {self.path} has none of {', '.join(MARKERS)}: choose "
                "another `--output DIR`."
            )
        if replaced and (self.path.is_mount() or self.path.resolve() == Path.cwd()):
            raise InputError(
                f"`overwrite` cannot move {self.path} aside, which is in use: choose another `--output DIR`."
            )
        # replacing a folder renames it, which needs permission in its parent
        parent = self.path.absolute().parent if replaced else self.path.absolute()
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or _is_read_only(parent):
            raise InputError(f"`output` must be in a folder that can be written to, {parent} cannot.")

    def claim(self) -> None:
        """Creates the folder, after moving aside the one that it replaces."""
        self.check()
        if self.path.is_dir() and self.overwrite and not self.resume:
            # beside the folder and not in the system's temporary one, because a rename works only within a file system
            aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced-", dir=self.path.absolute().parent))
            self._replaced = aside / self.path.name
            self.path.rename(self._replaced)
        try:
            self._created = not self.resume  # an empty folder that existed counts as created
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError:
            self.give_up()
            raise
        for draft in self.path.rglob(".*.partial-*"):  # left by a run that was killed
            clear_draft(draft)

    def finish(self) -> None:
        """Deletes the folder that this one replaced, once the run has succeeded."""
        self._created = False
        if self._replaced is not None:
            shutil.rmtree(self._replaced.parent)
            self._replaced = None

    def give_up(self) -> bool:
        """Removes the folder of a failed run, restores the one that it replaced, and returns whether it did so.

        Nothing is removed if the folder has a model or a checkpoint to continue from, or if this run did not create it.
        The removal is there so that the same command can be run again; an existing folder would be refused.
        """
        if not self._created or (self.path / "model").exists() or any(self.path.rglob("*.ckpt")):
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        if self._replaced is not None:
            self._replaced.rename(self.path)
            self._replaced.parent.rmdir()
        self._replaced, self._created = None, False
        return True

    @property
    def replaced(self) -> Path | None:
        """Path of the replaced folder until this run has succeeded; None if nothing was replaced."""
        return self._replaced


def _is_read_only(folder: Path) -> bool:
    """Returns whether writing to ``folder`` fails; for the superuser, ``os.access`` calls every folder writable."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return False
    except OSError:
        return True
