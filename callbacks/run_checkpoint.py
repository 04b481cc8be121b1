"""RunCheckpoint: the one checkpoint that a run goes on from when it was stopped."""

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
    """Keeps `last.ckpt`: at the start, every so many optimizer steps, at the end of every epoch and of the training.

    A run that is killed goes on from there. The file is replaced only by one that is whole. On an exception it is
    written where the last step is through; an exception in mid-step leaves the earlier one, since half a step can
    not be resumed. In several processes every exception does: all have to take part in a checkpoint.

    Args:
        folder: Where `last.ckpt` goes.
        every_n_steps: Optimizer steps from one to the next.

    Raises:
        InputError: for a number of steps below 1.
    """

    def __init__(self, folder: str, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise InputError(f"`checkpoint_every` must be at least 1, a number of steps, got {every_n_steps}.")
        self.path, self.every_n_steps = Path(folder) / "last.ckpt", every_n_steps
        self._saved: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes checkpoints atomic, unless the Trainer was given another way to write them."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what a run begins with; a run that was resumed has that."""
        if trainer.ckpt_path is None:
            self._save(trainer)
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after a step that is due; within a window of accumulated gradients there is none."""
        step = trainer.global_step
        last = step == trainer.max_steps or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if step != self._saved and (last or step % self.every_n_steps == 0):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the end of a training that was stopped early."""
        if trainer.global_step != self._saved:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves where the last step is through; of several processes, of which others may go on, none does."""
        if trainer.world_size > 1:
            return
        loop = trainer.fit_loop.epoch_loop
        progress: Any = loop.batch_progress.current
        through = progress.ready == progress.processed and not loop._should_accumulate()
        if trainer.training and through and self._saved not in (None, trainer.global_step):
            self._save(trainer)
        if isinstance(exception, KeyboardInterrupt) and self._saved is not None:
            log(f"Interrupted: {self.path} has step {self._saved}; the same command with `--ckpt_path last` goes on.")

    def _save(self, trainer: Trainer) -> None:
        self._saved = trainer.global_step  # before it is, so that one that fails is not tried again on the exception
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path, weights_only=False)
