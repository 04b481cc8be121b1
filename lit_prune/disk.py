"""Which errors say that a disk takes no more; safetensors and torch raise errors of their own for it."""

from __future__ import annotations

import errno
import os
import re

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
