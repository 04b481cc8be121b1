"""A cache on disk of the masked weights of every block at several levels of sparsity.

Suffixes: O out, I in, K weights that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.models.families import Block
from lit_prune.models.tensors import pack_bits, unpack_bits
from lit_prune.search.trial import Trial

Weights = dict[str, Tensor]
Cut = Callable[[Block, float], Weights]
DENSE = "dense"


class MaskCache:
    """The weights of blocks at all rates requested so far, in a folder.

    A level is the number of pruned weights of a block. It is computed from the dense weights on its first request. Its
    file has one bit per weight for the mask, and the kept weights only if they differ from the dense ones, as those of
    SparseGPT do. This is an eighth of a byte per weight, or 1.3 bytes for SparseGPT at 0.7 in float32. Files are
    memory-mapped, so that memory does not grow with the number of levels.

    Args:
        blocks: The blocks, dense.
        cut: Function of a dense block and a rate that returns the pruned weights by linear.
        folder: Folder of the files.
    """

    def __init__(self, blocks: Sequence[Block], cut: Cut, folder: Path) -> None:
        self.blocks, self.cut, self.folder = blocks, cut, folder
        self.levels: list[str] = [DENSE] * len(blocks)
        for block in blocks:
            weights = {name: linear.weight_OI.contiguous().cpu() for name, linear in block.linears.items()}
            save_file(weights, self._file(block, DENSE))

    def take(self, rates: Sequence[float]) -> None:
        """Gives every block the weights of its rate, writing only blocks whose level changes."""
        for block, rate in zip(self.blocks, rates, strict=True):
            level = str(round(rate * block.size))
            if self.levels[block.index] == level:
                continue
            if not self._file(block, level).exists():
                self._make(block, level, rate)
            self._write(block, level, self._weights(block, level))

    def restore(self) -> None:
        """Makes every block dense again, bit for bit."""
        for block in self.blocks:
            if self.levels[block.index] != DENSE:
                self._write(block, DENSE, self._dense(block))

    def _make(self, block: Block, level: str, rate: float) -> None:
        if self.levels[block.index] != DENSE:
            self._write(block, DENSE, self._dense(block))
        stored: Weights = {}
        for name, pruned_OI in self.cut(block, rate).items():
            keep_OI, dense_OI = pruned_OI != 0, block.linears[name].weight_OI
            stored[f"keep.{name}"] = pack_bits(keep_OI)
            if not torch.equal(torch.where(keep_OI, dense_OI, 0), pruned_OI):
                stored[f"new.{name}"] = pruned_OI[keep_OI].cpu()
        save_file(stored, self._file(block, level))

    def _weights(self, block: Block, level: str) -> Weights:
        stored, dense = load_file(self._file(block, level)), self._dense(block)
        return {name: _rebuilt(stored, name, dense_OI) for name, dense_OI in dense.items()}

    def _dense(self, block: Block) -> Weights:
        return load_file(self._file(block, DENSE))

    def _write(self, block: Block, level: str, weights: Weights) -> None:
        # if an interrupt comes before all linears are written, restore() must not mistake the block for a dense one
        self.levels[block.index] = "half written"
        for name, weight_OI in weights.items():
            block.linears[name].write(weight_OI)
        self.levels[block.index] = level

    def _file(self, block: Block, level: str) -> Path:
        return self.folder / f"{block.index}-{level}.safetensors"


def _rebuilt(stored: Weights, name: str, dense_OI: Tensor) -> Tensor:
    """The weight of a linear at a level, from its mask and its new values, if there are any."""
    keep_OI = unpack_bits(stored[f"keep.{name}"], dense_OI.shape)
    new_K = stored.get(f"new.{name}")
    if new_K is None:
        return dense_OI.masked_fill(~keep_OI, 0)
    return torch.zeros_like(dense_OI).masked_scatter(keep_OI, new_K)


class MaskedTrial(Trial):
    """A trial that swaps in weights from a mask cache."""

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Batch], cache: MaskCache, granularity: Sequence[int]
    ) -> None:
        super().__init__(model, batches)
        self.cache, self.granularity = cache, granularity

    def take(self, rates: Sequence[float]) -> None:
        """Swaps in the weights of the rates."""
        self.cache.take(rates)


@contextmanager
def mask_cache(blocks: Sequence[Block], cut: Cut) -> Iterator[MaskCache]:
    """Yields a mask cache in a temporary folder (under `TMPDIR`); after the context the blocks are dense again."""
    with TemporaryDirectory(prefix="lit_prune-levels-") as folder:
        cache = MaskCache(blocks, cut, Path(folder))
        try:
            yield cache
        finally:
            cache.restore()
