"""Files and folders that appear whole or not at all, and the errors of a disk that cannot be written to.

What is written goes to a draft beside its target, which is then renamed: a rename within a file system is atomic, so
that a reader, or a run that is resumed after a kill, sees the old version or the new one, never half of either.

Nothing is fsynced here. A kill of the process loses nothing that was written, since the system has it; a crash of the
machine may, and results can be exported again from a checkpoint. Checkpoints are synced by ``AtomicCheckpointIO``.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_prune.errors import InputError

WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
REPLACED = "replaced"  # where a folder stands, inside the draft's, while another takes its name


def refused(error: BaseException) -> str | None:
    """Returns the system's message for a disk that could not be written to, None for any other error.

    >>> refused(OSError(28, "any"))
    'No space left on device'
    """
    cause: BaseException | None = error
    while cause is not None:
        if (number := _error_number(cause)) in WRITE_ERRORS:
            return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return None


def _error_number(error: BaseException) -> int:
    """The operating system's number of an error, 0 without one."""
    if isinstance(error, OSError):
        return error.errno or 0
    # safetensors raises an error of its own, written in Rust, which has the number in its text alone
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    return int(in_text.group(1)) if in_text else 0


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yields a path beside ``target`` to write a file or a folder to, and renames it when the context ends normally.

    The earlier ``target`` is replaced. After an exception it is as it was, and nothing is left beside it.

    Raises:
        InputError: if the disk cannot be written to.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            draft = folder / target.name
            yield draft
            _apply_umask(draft)
            # A file is replaced by one rename. A folder that is not empty cannot be, so that it takes two, and between
            # them there is none: `clear_draft` puts the new one, which is whole, in its place after an interrupt.
            if target.is_dir():
                target.rename(folder / REPLACED)
            draft.replace(target)
        finally:
            clear_draft(folder)
    except InputError:
        raise
    except Exception as error:
        if (reason := refused(error)) is None:
            raise
        raise InputError(
            f"`output` must be where there is room, {target} could not be written: {reason}. "
            f"{'The earlier one is as it was' if target.exists() else 'Nothing of it is left'}; free some space, or "
            "choose another `--output DIR`."
        ) from error


def _apply_umask(draft: Path) -> None:
    """Gives safetensors files, which are created readable by their owner alone, the mode of any other new file."""
    probe = draft.parent / ".mode"  # the umask itself can be read only by setting it, for all threads
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    for file in (draft, *draft.rglob("*.safetensors")):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def clear_draft(draft: Path) -> None:
    """Deletes the folder of a draft; a new version that was stopped between its two renames gets its name first."""
    name = draft.name.removeprefix(".").rpartition(".partial-")[0]
    if (draft / REPLACED).is_dir() and (draft / name).is_dir() and not (draft.parent / name).exists():
        (draft / name).rename(draft.parent / name)
    shutil.rmtree(draft, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Writes a text file aside and renames it."""
    with written_aside(target) as draft:
        draft.write_text(text, encoding="utf-8")
