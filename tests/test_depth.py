"""From the Trainer's hook to |W| * ||X|| a reader follows a handful of calls."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lit_prune.callbacks import DynamicPruningCallback
from torch import Tensor
from torch.utils.data import DataLoader

import lit_prune
from lit_prune.allocate import Uniform
from lit_prune.calibration.statistics import INPUTS, InputStatistics
from lit_prune.calibration.windows import Calibration
from lit_prune.pruning.mask_method import ScoredMethod
from lit_prune.recover import FullFineTuning
from tests.conftest import small_model

ROOM, CALLBACKS = Path(lit_prune.__file__).parent, Path(inspect.getfile(DynamicPruningCallback)).parent
CALLS: list[list[str]] = []


@final
@dataclass(frozen=True)
class Watching(ScoredMethod):
    """Magnitude, which records the functions of the package that it was called through."""

    by_row: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({INPUTS})

    def score(self, weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
        ours = [frame for frame in inspect.stack()[1:] if {ROOM, CALLBACKS} & set(Path(frame.filename).parents)]
        CALLS.append([frame.function for frame in ours][::-1])
        return weight_OI.float().abs()


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(("step", "hook"), [(0, "setup"), (1, "on_train_batch_start")])
def test_five_functions_from_the_hook_to_the_formula(step: int, hook: str) -> None:
    CALLS.clear()
    rows = [{"input_ids": torch.arange(8) + row} for row in range(8)]
    callback = DynamicPruningCallback(
        method=Watching(),
        allocation=Uniform(),
        at_step=step,
        calibration=Calibration(num_samples=4, seq_length=8),
        recovery=FullFineTuning(),
        measure=False,
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=2, callbacks=[callback], logger=False, enable_checkpointing=False, barebones=False
    )
    trainer.fit(Module(), DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
    assert CALLS
    for calls in CALLS:
        assert calls == [hook, "prune", "apply", "prune"]  # and then `score`
