"""Reset of the best scores that other callbacks keep: after a cut they are of another model."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


def reset_best_scores(trainer: Trainer) -> None:
    """Resets the best scores of every ModelCheckpoint and EarlyStopping of ``trainer``; deletes no file.

    A ModelCheckpoint without a monitor has no score, and is left as it is.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models, callback.kth_best_model_path, callback.best_model_path = {}, "", ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
