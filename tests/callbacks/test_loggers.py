import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lit_prune.callbacks.loggers import PICTURE, TABLE, log_results
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_prune.report.figure import save_figure
from tests.report.reports import REPORT, perplexity


class Calls(list):
    """Records what is called on it, by name."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.append((name, args, kwargs))


def test_a_logger_of_numbers_gets_the_numbers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    log_results([logger], perplexity(dense=20.0, pruned=60.0), None, 7)
    logger.finalize("success")
    [row] = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
    assert {name: float(value) for name, value in row.items()} == {
        "perplexity/dense": 20.0,
        "perplexity/pruned": 60.0,
        "pruning/sparsity": 0.4999,
        "step": 7,
    }


def test_tensorboard_gets_table_and_picture(tmp_path: Path) -> None:
    save_figure(tmp_path / "blocks.png", REPORT)
    logger = TensorBoardLogger(tmp_path)
    log_results([logger], REPORT, tmp_path / "blocks.png", 7)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Scalars("perplexity/recovered")[0].value == 30
    [image] = events.Images(PICTURE)
    assert (image.width, image.height, image.step) == (1200, 480, 7)
    [text] = events.Tensors(f"{TABLE}/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert any("perplexity, recovered" in line for line in lines)
    assert all(line.startswith("    ") for line in lines)


def test_tensorboard_gets_the_colours_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_figure(tmp_path / "blocks.png", REPORT)
    calls, logger = Calls(), TensorBoardLogger(tmp_path)
    monkeypatch.setattr(TensorBoardLogger, "experiment", calls)
    monkeypatch.setattr(TensorBoardLogger, "log_metrics", calls.log_metrics)
    log_results([logger], REPORT, tmp_path / "blocks.png", 7)
    image_HWC = next(args[1] for name, args, _ in calls if name == "add_image")
    assert image_HWC.dtype == np.uint8
    assert image_HWC.shape == (480, 1200, 3)
    assert image_HWC[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", [WandbLogger, MLFlowLogger])
@pytest.mark.parametrize("drawn", [True, False])
def test_loggers_with_places_of_their_own(
    kind: type, drawn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, logger = Calls(), object.__new__(kind)
    for name in ("log_metrics", "log_text", "log_image"):
        monkeypatch.setattr(kind, name, getattr(calls, name), raising=False)
    monkeypatch.setattr(kind, "experiment", calls)
    monkeypatch.setattr(kind, "run_id", "run", raising=False)
    log_results([logger], REPORT, tmp_path / "blocks.png" if drawn else None, 7)
    (first, args, kwargs), *others = calls
    assert first == "log_metrics"
    assert args[-1]["perplexity/recovered"] == 30.0
    assert kwargs == {"step": 7}
    picture = {WandbLogger: "log_image", MLFlowLogger: "log_artifact"}[kind]
    assert [name for name, *_ in others] == ["log_text", *([picture] if drawn else [])]
    assert "perplexity, recovered" in str(others[0])
    assert not drawn or "blocks.png" in str(others[1])
