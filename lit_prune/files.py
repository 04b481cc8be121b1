"""Atomic writes of files and folders, and the errors of a disk that cannot be written to.

Files are written to a draft beside their target, which is then renamed. A rename within a file system is atomic, so
that a reader, or a run that is resumed after a kill, sees either the old version or the new one in full.

Nothing is fsynced here. If the process is killed, what it has written is safe with the operating system; if the
machine crashes, it may be lost, but results can be exported again from a checkpoint. Checkpoints are synced by
``AtomicCheckpointIO``.
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
CACHE_ERRORS = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
CACHES = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")  # environment variables, like HF_HOME
REPLACED = "replaced"  # name of the old folder, inside the draft's folder, while the new one is renamed


def disk_error(error: BaseException) -> str | None:
    """Returns the system's message if a disk could not be written to, None for any other error.

    >>> disk_error(OSError(28, "any"))
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
    # safetensors, written in Rust, raises its own error, which gives the number only in its text
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match.group(1)) if match else 0


def cache_error(error: BaseException) -> InputError | None:
    """Returns the error for a cache of Hugging Face's libraries that cannot be written to; None for any other error.

    transformers, datasets and huggingface_hub read even local files, and a model's own code, by way of their caches.
    """
    from huggingface_hub import constants

    homes = [constants.HF_HOME, *(os.environ.get(name) for name in CACHES)]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in CACHE_ERRORS and isinstance(cause.filename, str):
            path = Path(cause.filename).absolute()
            for home in (Path(home).absolute() for home in homes if home):
                if home == path or home in path.parents or path in home.parents:
                    return InputError(
                        "`HF_HOME`, the environment variable, must name a folder that can be written to, where Hugging "
                        f"Face's libraries keep their cache: {path} cannot ({os.strerror(cause.errno)})."
                    )
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yields a path beside ``target`` to write a file or a folder to, and renames it when the context ends normally.

    An existing ``target`` is replaced. After an exception it is unchanged, and the draft is deleted.

    Raises:
        InputError: if the disk cannot be written to.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            draft = folder / target.name
            yield draft
            _apply_umask(draft)
            # One rename replaces a file. A folder that is not empty takes two, and an interrupt between them leaves no
            # folder at ``target``: `clear_draft` then renames the new one, which is complete.
            if target.is_dir():
                target.rename(folder / REPLACED)
            draft.replace(target)
        finally:
            clear_draft(folder)
    except InputError:
        raise
    except Exception as error:
        if (reason := disk_error(error)) is None:
            raise
        raise InputError(
            f"`output` must be on a disk with enough space, {target} could not be written: {reason}. "
            f"{'The old version is unchanged' if target.exists() else 'No part of it was kept'}; free some space, or "
            "choose another `--output DIR`."
        ) from error


def _apply_umask(draft: Path) -> None:
    """Gives safetensors files, which only their owner may read, the mode of any other new file."""
    probe = draft.parent / ".mode"  # os.umask can only be read by setting it, for all threads
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    for file in (draft, *draft.rglob("*.safetensors")):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def clear_draft(draft: Path) -> None:
    """Deletes the folder of a draft, after finishing a replacement that was interrupted between its two renames."""
    name = draft.name.removeprefix(".").rpartition(".partial-")[0]
    if (draft / REPLACED).is_dir() and (draft / name).is_dir() and not (draft.parent / name).exists():
        (draft / name).rename(draft.parent / name)
    shutil.rmtree(draft, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_write(target) as draft:
        draft.write_text(text, encoding="utf-8")
