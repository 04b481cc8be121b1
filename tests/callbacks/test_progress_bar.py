"""The progress bar of a fit has the metrics of the training and of the last validation, and is the only one."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lit_prune.callbacks.progress_bar import FitProgressBar

from tests.callbacks.test_dynamic_pruning import Foreign, callback, fit, loader


@pytest.mark.parametrize(("bar", "usual"), [(TQDMProgressBar(), True), (FitProgressBar(), False)])
def test_there_is_one_bar_without_the_version_of_the_logger(
    bar: TQDMProgressBar, usual: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"logger": CSVLogger(tmp_path), "enable_progress_bar": True, "callbacks": [bar]}
    fit(Foreign(), callback(measure=False), loader(1), max_steps=8, **fields)  # type: ignore[arg-type]
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert "8/8" in printed
    assert ("Validation" in printed) is usual
    assert ("v_num" in printed) is usual
