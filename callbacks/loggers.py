"""Logs the results of a run to the Trainer's loggers: numbers, table and picture."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from rich.console import Console

from lit_prune.report.report import Report
from lit_prune.report.table import table

TABLE, PICTURE = "pruning/results", "pruning/blocks"
WIDTH = 100


def log_results(loggers: Iterable[Logger], report: Report, picture: Path | None, step: int) -> None:
    """Logs the perplexities and the sparsity to every logger, and table and picture to TensorBoard, W&B and MLflow.

    Args:
        loggers: Loggers of the Trainer.
        report: Report of the run.
        picture: Path of the PNG file; None if none was drawn.
        step: Optimizer step.
    """
    for logger in loggers:
        logger.log_metrics(_numbers(report), step=step)
        if isinstance(logger, TensorBoardLogger):
            _to_tensorboard(logger.experiment, report, picture, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(TABLE, columns=["table"], data=[[_text(report)]])
            if picture is not None:
                logger.log_image(PICTURE, [str(picture)])
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, _text(report), f"{TABLE}.txt")
            if picture is not None:
                logger.experiment.log_artifact(logger.run_id, str(picture), "pruning")


def _to_tensorboard(writer: Any, report: Report, picture: Path | None, step: int) -> None:
    indented = "\n".join(f"    {line}" for line in _text(report).splitlines())  # as Markdown's code
    writer.add_text(TABLE, indented, step)
    if picture is not None:
        image_HWC = (imread(picture)[..., :3] * 255).round().astype(np.uint8)
        writer.add_image(PICTURE, image_HWC, step, dataformats="HWC")


def _numbers(report: Report) -> dict[str, float]:
    """Returns the metrics: every perplexity by its name, and the share of zeros."""
    assert report.sparsity.achieved_linears is not None
    perplexities = {f"perplexity/{name}": value for name, value in report.measured.items()}
    return perplexities | {"pruning/sparsity": report.sparsity.achieved_linears}


def _text(report: Report) -> str:
    text = io.StringIO()
    Console(width=WIDTH, file=text).print(table(report))
    return text.getvalue()
