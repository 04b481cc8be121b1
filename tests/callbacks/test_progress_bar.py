"""The progress bar of a fit has the metrics of the training and of the last validation, and is the only one."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lit_prune.callbacks.progress_bar import FitProgressBar

from tests.callbacks.test_dynamic_pruning import Foreign, callback, fit, loader


class Logging(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/steps", float(self.trainer.global_step), prog_bar=True)
        self.log("val/always", float("nan"), prog_bar=True)


@pytest.mark.parametrize(("bar", "usual"), [(TQDMProgressBar(), True), (FitProgressBar(), False)])
def test_there_is_one_bar_without_the_version_of_the_logger(
    bar: TQDMProgressBar,
    usual: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fields = {"logger": CSVLogger(tmp_path), "enable_progress_bar": True, "callbacks": [bar]}
    fit(Foreign(), callback(measure=False), loader(1), max_steps=8, **fields)  # type: ignore[arg-type]
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert "8/8" in printed
    assert ("Validation" in printed) is usual
    assert ("v_num" in printed) is usual


def test_without_a_terminal_there_are_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"enable_progress_bar": True, "callbacks": [FitProgressBar()], "accumulate_grad_batches": 2}
    fit(Logging(), callback(measure=False), loader(1), max_steps=35, **fields)  # type: ignore[arg-type]
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert "it/s" not in printed
    steps = re.findall(r"^Step (\d+) of 35, train/loss [\d.]+$", printed, re.MULTILINE)
    assert [int(step) for step in steps] == [4, 8, 12, 16, 20, 24, 28, 32, 35]
    validated = re.findall(r"^Step (\d+), validated, val/steps (\d+), val/always nan$", printed, re.MULTILINE)
    assert validated == [(str(step), str(step)) for step in range(4, 36, 4)]
