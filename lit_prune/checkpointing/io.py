"""Atomic writing of checkpoints: a process that is killed never leaves half a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_prune.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint plugin that writes a local checkpoint to a file in the same folder and renames that.

    Lightning's own moves the file from the system's temporary folder, which across file systems is a copy that a kill
    can interrupt.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves ``checkpoint`` to ``path``; an existing file is replaced once the new one is on the disk."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as draft, draft.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
