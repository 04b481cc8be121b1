"""The one line that the command prints before it exits for an error of the user."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def rank() -> int:
    """Returns the rank of this process from the environment, since torch.distributed is not initialised yet."""
    variables = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in Lightning's order
    return next((int(os.environ[name]) for name in variables if name in os.environ), 0)


def fail(message: str) -> NoReturn:
    """Prints ``message`` to stderr and exits with code 2."""
    where = f" (process {rank()})" if rank() else ""
    print(f"lit-prune: error{where}: {message}", file=sys.stderr)
    sys.exit(2)
