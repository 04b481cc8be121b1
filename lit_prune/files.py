"""Files and folders written aside and renamed, and the errors of a disk that cannot be written to."""

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

REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def refused(error: BaseException) -> str | None:
    """Returns what a disk said that could not be written to, None where an error is not about that.

    >>> refused(OSError(28, "any"))
    'No space left on device'
    """
    cause: BaseException | None = error
    while cause is not None:
        if (number := _number(cause)) in REFUSES:
            return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return None


def _number(error: BaseException) -> int:
    """The operating system's number of an error, 0 without one; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told.group(1)) if told else 0


REPLACED = "replaced"  # what stood in the place of a folder, while that takes it


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Gives a path beside ``target`` to write a file or a folder to, and renames it when the context ends well.

    What stood at ``target`` is replaced; after an exception it stands as it was, and nothing is left beside it. An
    interrupt between the two renames that replace a folder leaves the new one there, which is whole.

    Raises:
        InputError: if the disk takes no more.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            draft = folder / target.name
            yield draft
            _open_as_usual(draft)
            if target.is_dir():
                target.rename(folder / REPLACED)
            draft.replace(target)
        finally:
            clear_draft(folder)
    except InputError:
        raise
    except Exception as error:
        if (told := refused(error)) is None:
            raise
        raise InputError(
            f"`output` must be where there is room, {target} could not be written: {told}. "
            f"{'The earlier one is as it was' if target.exists() else 'Nothing of it is left'}; free some space, or "
            "choose another `--output DIR`."
        ) from error


def _open_as_usual(draft: Path) -> None:
    """Lets others read what safetensors made for its owner alone, as far as the umask does."""
    probe = draft.parent / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    for file in (draft, *draft.rglob("*.safetensors")):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def clear_draft(draft: Path) -> None:
    """Deletes what was being written aside; a folder that was whole, and stopped between two names, gets its own."""
    name = draft.name.removeprefix(".").rpartition(".partial-")[0]
    if (draft / REPLACED).is_dir() and (draft / name).is_dir() and not (draft.parent / name).exists():
        (draft / name).rename(draft.parent / name)
    shutil.rmtree(draft, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Writes a file aside and renames it."""
    with written_aside(target) as draft:
        draft.write_text(text, encoding="utf-8")
