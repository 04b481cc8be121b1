"""RunCheckpoint, which keeps the one checkpoint that an interrupted run is resumed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lit_prune.checkpointing.io import AtomicCheckpointIO
from lit_prune.errors import InputError
from lit_prune.progress import log


class RunCheckpoint(Checkpoint):
    """Saves `last.ckpt` at the start, every `every_n_steps` steps, and at the end of every epoch and of the training.

    The file is replaced atomically, so a run can be resumed whenever it was killed. On an exception between two
    optimizer steps it is saved once more. An exception within a step leaves the earlier file, since half a step cannot
    be resumed; so does any exception in several processes, since all of them have to take part in saving.

    Args:
        folder: Folder of `last.ckpt`.
        every_n_steps: Number of optimizer steps between checkpoints.

    Raises:
        InputError: for a number of steps below 1.
    """

    def __init__(self, folder: str, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise InputError(f"`checkpoint_every` must be at least 1, a number of steps, got {every_n_steps}.")
        self.path, self.every_n_steps = Path(folder) / "last.ckpt", every_n_steps
        self._saved: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the Trainer write checkpoints atomically, unless it was given a checkpoint plugin."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the state before the first step; a resumed run has a checkpoint already."""
        if trainer.ckpt_path is None:
            self._save(trainer)
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves every `every_n_steps` optimizer steps and after the last; never between accumulated batches."""
        step = trainer.global_step
        last = step == trainer.max_steps or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if step != self._saved and (last or step % self.every_n_steps == 0):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step of a training that was stopped early."""
        if trainer.global_step != self._saved:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves after an exception between two optimizer steps, in a run of one process."""
        if trainer.world_size > 1:  # the other processes may not have raised, and saving would wait for them
            return
        loop = trainer.fit_loop.epoch_loop
        progress: Any = loop.batch_progress.current
        is_between_steps = progress.ready == progress.processed and not loop._should_accumulate()
        if trainer.training and is_between_steps and self._saved not in (None, trainer.global_step):
            self._save(trainer)
        if isinstance(exception, KeyboardInterrupt) and self._saved is not None:
            log(f"Interrupted: {self.path} has step {self._saved}; the same command with `--ckpt_path last` goes on.")

    def _save(self, trainer: Trainer) -> None:
        self._saved = trainer.global_step  # set first, so that `on_exception` does not retry a save that failed
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path, weights_only=False)
