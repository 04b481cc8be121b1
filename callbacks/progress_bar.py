"""The progress bar of a fit."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class FitProgressBar(TQDMProgressBar):
    """Lightning's bar of the training, which shows the last validation's perplexity but no bar of the validation.

    A second bar below the first would flicker with every validation.
    """

    def init_validation_tqdm(self) -> Tqdm:
        """Returns a bar that is never drawn."""
        return Tqdm(disable=True)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Returns the metrics without the version of the logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
