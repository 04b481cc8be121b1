"""The structure of a model that has lost blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from transformers import PreTrainedModel

from lit_prune.depth.renumber import drop_blocks
from lit_prune.models.structure import Description, Structure, find_structure


@final
@dataclass(frozen=True)
class RemainingBlocks(Structure):
    """The blocks of the dense model that a model still has.

    Attributes:
        remaining: Their numbers in the dense model, in order.
        blocks: Number of blocks of the dense model.
        path: Dotted path of the list of blocks.
    """

    remaining: Sequence[int]
    blocks: int
    path: str

    rebuilt_first: ClassVar[bool] = True

    def rebuild(self, model: PreTrainedModel) -> None:
        """Removes the other blocks of a model that has them, all or some; see :meth:`Structure.rebuild`."""
        layers: Any = model.get_submodule(self.path)
        if len(layers) != len(self.remaining):
            earlier = find_structure(model, RemainingBlocks)
            present = list(range(self.blocks) if earlier is None else earlier.remaining)
            drop_blocks(model, self.path, [present.index(block) for block in self.remaining])

    def describe(self, model: PreTrainedModel) -> Description:
        """Returns the numbers of the blocks that remain, and of those that were removed."""
        removed = [block for block in range(self.blocks) if block not in self.remaining]
        achieved = len(removed) / self.blocks
        left = f"{len(self.remaining)} of {self.blocks}"
        return Description(
            name="depth",
            facts={"achieved": achieved, "blocks": self.blocks, "removed": removed, "remaining": list(self.remaining)},
            done="Shortened",
            outcome=f"{left} blocks remain; removed are {spans(removed)}." if removed else f"all {left} blocks remain.",
            rows={
                "blocks removed, share": f"{achieved:.4f}",
                "blocks that remain": f"{left}, without {spans(removed)}" if removed else left,
            },
            unit="blocks",
            noun="block",
            sizes=tuple(int(block in self.remaining) for block in range(self.blocks)),
            full=1,
            achieved=achieved,
        )


def spans(numbers: Iterable[int]) -> str:
    """Returns ascending numbers as text, with three and more neighbours together: 3, 7, 8, 9 as `3, 7 to 9`."""
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs_of(numbers)]
    return ", ".join(texts)


def runs_of(numbers: Iterable[int]) -> list[list[int]]:
    """Returns ascending numbers in runs of neighbours: 3, 7, 8 as [[3], [7, 8]]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
