"""The blocks that a reconstruction has finished, in a folder from which it is resumed after an interrupt.

A resumed cut cuts every block again, which gives the same zeros, and takes the weights of the finished ones from the
folder instead of training them. The folder has a key, of the model, the text and the recipe, and one file for each
block, written atomically.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_prune import distributed
from lit_prune.calibration.cached_statistics import Key
from lit_prune.errors import InputError
from lit_prune.files import atomic_write, write_text
from lit_prune.models.families import Block
from lit_prune.reconstruct.losses import BlockLosses

KEY = "key.json"
CHANGE = "choose another folder by `--pruning.reconstruction.state FOLDER`"
Weights = dict[str, Tensor]


def check_folder(path: str) -> None:
    """Raises InputError unless ``path`` is a folder of finished blocks, or one that can be made."""
    folder = Path(path)
    if not folder.absolute().parent.is_dir():
        raise InputError(
            f"`pruning.reconstruction.state` must be in a folder that exists, got {path}: make it, or {CHANGE}."
        )
    if folder.exists() and not (folder / KEY).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"`pruning.reconstruction.state` must be a folder that a reconstruction wrote, {path} is not; {CHANGE}."
        )


class FinishedBlocks:
    """The weights and losses of the blocks that were finished before, and those that are added.

    Args:
        path: The folder; it is made if it does not exist.
        key: The model and the text.
        recipe: The recipe of the cut, JSON-serialisable.

    Raises:
        InputError: if the folder is not one of finished blocks, or is of another model, text or recipe.
    """

    def __init__(self, path: str, key: Key, recipe: Mapping[str, Any]) -> None:
        check_folder(path)
        self.folder = Path(path)
        self._check(key, recipe)
        if distributed.is_rank_zero() and not (self.folder / KEY).exists():
            self.folder.mkdir(exist_ok=True)
            write_text(self.folder / KEY, json.dumps({"key": vars(key), "recipe": recipe}) + "\n")
        count = 0
        while self._file(count).exists():
            count += 1
        # processes on machines without a common file system have different files
        self.count = min(distributed.all_gather(count))

    def _check(self, key: Key, recipe: Mapping[str, Any]) -> None:
        if not (self.folder / KEY).exists():
            return
        try:
            stored = json.loads((self.folder / KEY).read_text(encoding="utf-8"))
            before, recipe_before = Key(**stored["key"]), dict(stored["recipe"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"`pruning.reconstruction.state` must be a folder that a reconstruction wrote, {self.folder} is not; "
                f"{CHANGE}."
            ) from error
        differing = before.differences(key) + [
            f"`{name}` {recipe_before.get(name)}, now {value}"
            for name, value in recipe.items()
            if recipe_before.get(name) != value
        ]
        if differing:
            raise InputError(
                f"`pruning.reconstruction.state` must be of the same cut, {self.folder} is of another: "
                f"{'; '.join(differing)}. Change it back, or {CHANGE}."
            )

    def __contains__(self, block: Block) -> bool:
        """Whether ``block`` was finished before."""
        return block.index < self.count

    def restore(self, block: Block) -> BlockLosses:
        """Gives ``block``, which was just cut, the weights that it was finished with, and returns its losses.

        Raises:
            InputError: if the file is damaged, or of a block with another shape or other zeros.
        """
        file = self._file(block.index)
        try:
            with safe_open(file, framework="pt") as opened:
                losses = BlockLosses(**json.loads(opened.metadata()["losses"]))
                weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"`pruning.reconstruction.state` must have whole files, {file} is damaged: delete it, and the block "
                "is reconstructed again."
            ) from error
        for name, parameter in block.module.named_parameters():
            if name not in weights or not _same_zeros(parameter, weights[name]):
                raise InputError(
                    f"`pruning.reconstruction.state` must be of the same cut, {file} has another {name}; {CHANGE}."
                )
            parameter.detach().copy_(weights[name])
        return losses

    def add(self, block: Block, losses: BlockLosses) -> None:
        """Writes the weights of ``block``, which is finished."""
        if not distributed.is_rank_zero():
            return
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in block.module.named_parameters()}
        with atomic_write(self._file(block.index)) as draft:
            save_file(weights, draft, {"format": "pt", "losses": json.dumps(asdict(losses))})

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index}.safetensors"


def _same_zeros(parameter: Tensor, weight: Tensor) -> bool:
    """Returns whether two weights have one shape and, for matrices, the same zeros."""
    if parameter.shape != weight.shape or parameter.dtype != weight.dtype:
        return False
    return parameter.ndim < 2 or torch.equal(parameter.detach().cpu() == 0, weight == 0)
