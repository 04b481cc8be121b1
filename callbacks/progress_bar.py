"""The progress bar of a fit."""

from __future__ import annotations

import math
import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import TrainerFn

from lit_prune.progress import log

LINES = 10  # that a fit of known length prints where there is no terminal
STEPS_A_LINE = 100  # if its length is not known


class FitProgressBar(TQDMProgressBar):
    """Lightning's bar of the training, which shows the last validation's perplexity but no bar of the validation.

    A second bar below the first would flicker with every validation. Without a terminal, where a bar would be written
    once more at every step, it prints about ten lines, and one for every validation.
    """

    def init_train_tqdm(self) -> Tqdm:
        """Returns the bar of the training, which is drawn on a terminal only."""
        return super().init_train_tqdm() if sys.stdout.isatty() else Tqdm(disable=True)

    def init_validation_tqdm(self) -> Tqdm:
        """Returns a bar that is never drawn."""
        return Tqdm(disable=True)

    def on_train_start(self, *args: Any) -> None:
        """Creates the bar, and counts the steps of the fit."""
        super().on_train_start(*args)
        self._total, self._printed = self.trainer.estimated_stepping_batches, self.trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Advances the bar, or prints a line if it is time for one."""
        super().on_train_batch_end(trainer, pl_module, *args)
        step, is_known = trainer.global_step, self._total != math.inf
        interval = math.ceil(self._total / LINES) if is_known else STEPS_A_LINE
        is_new = step != self._printed  # with accumulated gradients a step has several batches
        if self.is_enabled and not sys.stdout.isatty() and is_new and (step % interval == 0 or step == self._total):
            self._printed = step
            log(f"Step {step}{f' of {self._total}' if is_known else ''}{_logged(trainer)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints a line with what the validation has logged."""
        super().on_validation_end(trainer, pl_module)
        in_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if in_fit and self.is_enabled and not sys.stdout.isatty():
            log(f"Step {trainer.global_step}, validated{_logged(trainer)}")

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Returns the metrics without the version of the logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def _logged(trainer: Trainer) -> str:
    """Returns what the bar would show of the loop that is running, without what another loop has logged."""
    metrics = trainer._logger_connector.metrics["pbar"]
    return "".join(f", {name} {float(value):.4g}" for name, value in metrics.items())
