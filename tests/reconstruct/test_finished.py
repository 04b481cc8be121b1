"""The folder of finished blocks: an interrupted reconstruction that is resumed ends with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.errors import InputError
from lit_prune.pipeline import Pruned, prune
from lit_prune.pruning import SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct
from lit_prune.reconstruct.finished import check_folder
from lit_prune.reconstruct.training import BlockTraining
from tests.conftest import lively_model

WINDOWS = list(torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(3)).split(1))


def cut(state: Path | None, **changed: Any) -> tuple[PreTrainedModel, Pruned]:
    model = lively_model("llama")
    recipe = Recipe(
        SparseGPT(), 0.5, Uniform(), reconstruction=Reconstruct(state=None if state is None else str(state))
    )
    return model, prune(model, WINDOWS, replace(recipe, **changed))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are trained, in order; the third is interrupted the first time."""
    blocks: list[int] = []
    original: Callable[..., Any] = BlockTraining.run

    def run(self: BlockTraining, batches: list[int]) -> Any:
        if self.settings.lr == Reconstruct().lr:  # not those that are trained again
            blocks.append(self.block.index)
        if blocks == [0, 1, 2]:
            raise KeyboardInterrupt
        return original(self, batches)

    monkeypatch.setattr(BlockTraining, "run", run)
    return blocks


def test_an_interrupted_reconstruction_ends_as_one_that_was_not(tmp_path: Path, trained: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        cut(tmp_path / "state")
    model, pruned = cut(tmp_path / "state")
    assert trained == [0, 1, 2, 2]
    whole, expected = cut(None)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), whole.parameters(), strict=True))
    assert pruned.reconstruction == expected.reconstruction
    cut(tmp_path / "state")
    assert trained == [0, 1, 2, 2, 0, 1, 2]  # a finished cut trains nothing again


def test_another_cut_and_other_files_are_refused(tmp_path: Path) -> None:
    cut(tmp_path / "state")
    for changed, difference in (
        ({"sparsity": 0.6}, "`sparsity` 0.5, now 0.6"),
        ({"method": Wanda()}, r"`method` SparseGPT\(.*, now Wanda"),
    ):
        with pytest.raises(InputError, match=f"state` must be of the same cut, .*: {difference}"):
            cut(tmp_path / "state", **changed)
    (tmp_path / "state" / "block-1.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="must have whole files, .*block-1.safetensors is damaged: delete it"):
        cut(tmp_path / "state")
    (tmp_path / "state" / "block-0.safetensors").replace(tmp_path / "state" / "block-1.safetensors")
    (tmp_path / "state" / "block-2.safetensors").replace(tmp_path / "state" / "block-0.safetensors")
    with pytest.raises(InputError, match="must be of the same cut, .*block-0.safetensors has another"):
        cut(tmp_path / "state")


def test_a_path_that_cannot_be_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be in a folder that exists, got .*absent/state: make it"):
        check_folder(str(tmp_path / "absent" / "state"))
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="must be a folder that a reconstruction wrote"):
            check_folder(str(path))
    check_folder(str(tmp_path / "new"))
