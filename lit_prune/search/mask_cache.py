"""Trial by masks: the weights of every block at a ladder of rates, each made once, kept on disk and swapped in.

Suffixes: O out, I in, N entries of a weight, K those that stay.
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
from lit_prune.models.bits import packed, unpacked
from lit_prune.models.families import Block
from lit_prune.search.trial import Trial

Weights = dict[str, Tensor]
Cut = Callable[[Block, float], Weights]
DENSE = "dense"


class MaskCache:
    """The weights of blocks at the rates that were asked for, in a folder.

    A rung is made from the dense weights when it is first asked for. What is kept of it is one bit for every weight,
    whether it stays, and the weights that stay only where they are not those of the dense block, as SparseGPT's are: an
    eighth of a byte for each weight of a rung, for SparseGPT at 0.7 in float32 1.3 bytes. Files are read as maps, so
    that memory does not grow with the rungs.

    Args:
        blocks: The blocks, dense.
        cut: Returns the weights of a dense block at a rate, by linear.
        folder: Where files go.
    """

    def __init__(self, blocks: Sequence[Block], cut: Cut, folder: Path) -> None:
        self.blocks, self.cut, self.folder = blocks, cut, folder
        self.standing: list[str] = [DENSE] * len(blocks)
        for block in blocks:
            weights = {name: linear.weight_OI.contiguous() for name, linear in block.linears.items()}
            save_file(weights, self._file(block, DENSE))

    def take(self, rates: Sequence[float]) -> None:
        """Puts every block on the rung of its rate; those that stand there already are left alone."""
        for block, rate in zip(self.blocks, rates, strict=True):
            rung = str(round(rate * block.size))
            if self.standing[block.index] == rung:
                continue
            if not self._file(block, rung).exists():
                self._make(block, rung, rate)
            self._write(block, rung, self._weights(block, rung))

    def restore(self) -> None:
        """Makes every block dense again, bit for bit."""
        for block in self.blocks:
            if self.standing[block.index] != DENSE:
                self._write(block, DENSE, self._dense(block))

    def _make(self, block: Block, rung: str, rate: float) -> None:
        if self.standing[block.index] != DENSE:
            self._write(block, DENSE, self._dense(block))
        stored: Weights = {}
        for name, pruned_OI in self.cut(block, rate).items():
            keep_OI, dense_OI = pruned_OI != 0, block.linears[name].weight_OI
            stored[f"keep.{name}"] = packed(keep_OI)
            if not torch.equal(torch.where(keep_OI, dense_OI, 0), pruned_OI):
                stored[f"new.{name}"] = pruned_OI[keep_OI]
        save_file(stored, self._file(block, rung))

    def _weights(self, block: Block, rung: str) -> Weights:
        stored, dense = load_file(self._file(block, rung)), self._dense(block)
        return {name: _rebuilt(stored, name, dense_OI) for name, dense_OI in dense.items()}

    def _dense(self, block: Block) -> Weights:
        return load_file(self._file(block, DENSE))

    def _write(self, block: Block, rung: str, weights: Weights) -> None:
        self.standing[block.index] = "half written"  # should an interrupt come now
        for name, weight_OI in weights.items():
            block.linears[name].write(weight_OI)
        self.standing[block.index] = rung

    def _file(self, block: Block, rung: str) -> Path:
        return self.folder / f"{block.index}-{rung}.safetensors"


def _rebuilt(stored: Weights, name: str, dense_OI: Tensor) -> Tensor:
    """The weight of a rung."""
    keep_OI = unpacked(stored[f"keep.{name}"], dense_OI.shape)
    new_K = stored.get(f"new.{name}")
    if new_K is None:
        return dense_OI.masked_fill(~keep_OI, 0)
    return torch.zeros_like(dense_OI).masked_scatter(keep_OI, new_K)


class MaskedTrial(Trial):
    """A model whose blocks stand on the rungs of a ladder."""

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Batch], ladder: MaskCache, grains: Sequence[int]
    ) -> None:
        super().__init__(model, batches)
        self.ladder, self.grains = ladder, grains

    def take(self, rates: Sequence[float]) -> None:
        """Swaps in the weights of the rates' rungs."""
        self.ladder.take(rates)


@contextmanager
def climbing(blocks: Sequence[Block], cut: Cut) -> Iterator[MaskCache]:
    """Gives a ladder in a temporary folder (`TMPDIR` says where); at the end the blocks are as they were."""
    with TemporaryDirectory(prefix="lit_prune-rungs-") as folder:
        ladder = MaskCache(blocks, cut, Path(folder))
        try:
            yield ladder
        finally:
            ladder.restore()
