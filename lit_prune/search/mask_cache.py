"""A cache on disk of the masked weights of every linear at several levels of sparsity.

Suffixes: O out, I in, K weights that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.models.families import Block
from lit_prune.models.tensors import pack_bits, unpack_bits
from lit_prune.search.trial import NamedTrial, Trial

Weights = dict[str, Tensor]
Cut = Callable[[Block, Mapping[str, float]], Weights]
Split = Callable[[int, float], dict[str, float]]
DENSE = "dense"


class MaskCache:
    """The weights of linears at all rates requested so far, in a folder.

    A level is the number of pruned weights of a linear. It is computed from the dense weights on its first request. Its
    file has one bit per weight for the mask, and the kept weights only if they differ from the dense ones, as those of
    SparseGPT do. This is an eighth of a byte per weight, or 1.3 bytes for SparseGPT at 0.7 in float32. Files are
    memory-mapped, so that memory does not grow with the number of levels.

    Args:
        blocks: The blocks, dense.
        cut: Function of a dense block and the rates of some of its linears that returns these, pruned.
        folder: Folder of the files.
    """

    def __init__(self, blocks: Sequence[Block], cut: Cut, folder: Path) -> None:
        self.blocks, self.cut, self.folder = blocks, cut, folder
        self.levels = {(block.index, name): DENSE for block in blocks for name in block.linears}
        for block in blocks:
            weights = {name: linear.weight_OI.contiguous().cpu() for name, linear in block.linears.items()}
            save_file(weights, self._file(block))

    def take(self, rates: Sequence[Mapping[str, float]]) -> None:
        """Gives every linear the weights of its rate, writing only those whose level changes."""
        for block, by_name in zip(self.blocks, rates, strict=True):
            levels = {name: _level(rate, block.linears[name].size) for name, rate in by_name.items()}
            changed = [name for name, level in levels.items() if self.levels[block.index, name] != level]
            missing = [name for name in changed if not self._exists(block, name, levels[name])]
            if missing:
                self._make(block, {name: by_name[name] for name in missing})
            for name in changed:
                self._write(block, name, levels[name])

    def restore(self) -> None:
        """Makes every block dense again, bit for bit."""
        for block in self.blocks:
            for name in block.linears:
                if self.levels[block.index, name] != DENSE:
                    self._write(block, name, DENSE)

    def _make(self, block: Block, rates: Mapping[str, float]) -> None:
        """Computes the weights of linears at their rates, which makes these linears dense meanwhile."""
        for name in rates:
            if self.levels[block.index, name] != DENSE:
                self._write(block, name, DENSE)
        some = replace(block, linears={name: block.linears[name] for name in rates})
        for name, pruned_OI in self.cut(some, rates).items():
            keep_OI, dense_OI = pruned_OI != 0, block.linears[name].weight_OI
            stored = {"keep": pack_bits(keep_OI)}
            if not torch.equal(torch.where(keep_OI, dense_OI, 0), pruned_OI):
                stored["new"] = pruned_OI[keep_OI].cpu()
            save_file(stored, self._file(block, name, _level(rates[name], block.linears[name].size)))

    def _write(self, block: Block, name: str, level: str) -> None:
        with safe_open(self._file(block), "pt") as file:
            weight_OI = file.get_tensor(name)
        if level != DENSE:
            weight_OI = _rebuilt(load_file(self._file(block, name, level)), weight_OI)
        # if an interrupt comes before all is written, restore() must not mistake the linear for a dense one
        self.levels[block.index, name] = "half written"
        block.linears[name].write(weight_OI)
        self.levels[block.index, name] = level

    def _exists(self, block: Block, name: str, level: str) -> bool:
        return level == DENSE or self._file(block, name, level).exists()

    def _file(self, block: Block, name: str = "", level: str = DENSE) -> Path:
        return self.folder / f"{block.index}-{name}-{level}.safetensors"


def _level(rate: float, size: int) -> str:
    return str(round(rate * size)) if round(rate * size) else DENSE


def _rebuilt(stored: Weights, dense_OI: Tensor) -> Tensor:
    """The weight of a linear at a level, from its mask and its new values, if there are any."""
    keep_OI = unpack_bits(stored["keep"], dense_OI.shape)
    if "new" not in stored:
        return dense_OI.masked_fill(~keep_OI, 0)
    return torch.zeros_like(dense_OI).masked_scatter(keep_OI, stored["new"])


class MaskedTrial(Trial):
    """A trial that swaps in weights from a mask cache.

    Args:
        model: The causal LM.
        batches: The calibration batches.
        cache: The mask cache of its blocks.
        granularity: For each block, the number of weights of which every change is a multiple.
        split: Function of a block's index and its rate that returns the rates of its linears.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        cache: MaskCache,
        granularity: Sequence[int],
        split: Split,
    ) -> None:
        super().__init__(model, cache.blocks[0].path_of_list, batches)
        self.batches, self.cache, self.granularity, self.split = batches, cache, granularity, split

    def take(self, rates: Sequence[float]) -> None:
        """Swaps in the weights of the rates."""
        self.cache.take([self.split(index, rate) for index, rate in enumerate(rates)])

    def take_unpruned(self) -> None:
        """Swaps in the weights of before; a rate of 0 is less than some blocks have lost already."""
        self.cache.restore()

    def by_name(self) -> NamedTrial:
        """Returns a trial of the same model with one rate per linear."""
        return MaskedLinearTrial(self.model, self.batches, self.cache, self.split)


class MaskedLinearTrial(NamedTrial):
    """A trial with one rate per linear that swaps in weights from a mask cache; see :class:`MaskedTrial`."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], cache: MaskCache, split: Split) -> None:
        super().__init__(model, cache.blocks[0].path_of_list, batches)
        self.cache, self._split = cache, split
        linears = [linear for block in cache.blocks for linear in block.linears.values()]
        self.names = [list(block.linears) for block in cache.blocks]
        self.sizes = [linear.size for linear in linears]
        self._pruned = [linear.pruned / linear.size for linear in linears]
        self.granularity = [1] * len(linears)

    def take(self, rates: Sequence[float]) -> None:
        """Swaps in the weights of the rates."""
        self.cache.take(self.by_block(rates))

    def take_unpruned(self) -> None:
        """Swaps in the weights of before."""
        self.cache.restore()

    def split(self, rates: Sequence[float]) -> list[float]:
        """Returns the rates of the linears under ``rates`` of the blocks."""
        by_block = [self._split(index, rate) for index, rate in enumerate(rates)]
        return [rate for by_name in by_block for rate in by_name.values()]

    def bounds(self, least: float, most: float) -> tuple[list[float], list[float]]:
        """Returns the same bounds for all linears, as far as these are not sparser already."""
        low = [max(least, pruned) for pruned in self._pruned]
        return low, [max(most, bound) for bound in low]


@contextmanager
def mask_cache(blocks: Sequence[Block], cut: Cut) -> Iterator[MaskCache]:
    """Yields a mask cache in a temporary folder (under `TMPDIR`); after the context the blocks are dense again."""
    with TemporaryDirectory(prefix="lit_prune-levels-") as folder:
        cache = MaskCache(blocks, cut, Path(folder))
        try:
            yield cache
        finally:
            cache.restore()
