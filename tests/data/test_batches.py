"""Calibration batches of a training dataloader that is being read."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_prune.calibration.windows import Calibration
from lit_prune.data.batches import calibration_batches
from lit_prune.data.loaders import ResumableLoader


class Windows(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.full((8,), index)}


def test_training_goes_on_where_it_was_when_a_cut_has_read_its_loader() -> None:
    loader = ResumableLoader(Windows(), batch_size=2, seed=0)
    source: Any = SimpleNamespace(dataloader=lambda: loader)
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(_data_source=source))
    training = iter(loader)
    read = [next(training)["input_ids"][:, 0].tolist() for _ in range(3)]
    batches, settings = calibration_batches(trainer, Calibration(num_samples=4, seq_length=8))
    assert [batch["input_ids"][:, 0].tolist() for batch in batches] == read[:2]
    assert settings["text"] == "training dataloader"
    assert loader.state_dict() == {"epoch": 0, "batches": 3}
    next(training)
    assert loader.state_dict() == {"epoch": 0, "batches": 4}
