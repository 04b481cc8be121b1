"""The structure of a model whose residual stream has fewer dimensions than the dense model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from transformers import PreTrainedModel

from lit_prune.hidden.stream_width import layout_of, narrow_ends, narrow_layer, set_width
from lit_prune.models.structure import Description, Structure


@final
@dataclass(frozen=True)
class HiddenSize(Structure):
    """The width of the residual stream, which is the same everywhere.

    Attributes:
        width: Number of dimensions.
        full: Number of dimensions of the dense model.
        blocks: Number of blocks.
    """

    width: int
    full: int
    blocks: int

    def rebuild(self, model: PreTrainedModel) -> None:
        """Removes the last dimensions, as many as the model has more; see :meth:`Structure.rebuild`."""
        config = model.config.get_text_config()
        if config.hidden_size == self.width:
            return
        layout, kept_K = layout_of(model), torch.arange(self.width)
        for index, layer in enumerate(model.get_submodule(layout.layers).children()):
            narrow_layer(layer, layout, kept_K, config, index)
        narrow_ends(model, layout, kept_K)
        set_width(model, self.width)

    def of_blocks(self, kept: Sequence[int]) -> HiddenSize:
        """Returns the width of a model with the blocks ``kept`` alone."""
        return replace(self, blocks=len(kept))

    def describe(self, model: PreTrainedModel) -> Description:
        """Returns the width and the share that was removed."""
        achieved = (self.full - self.width) / self.full
        return Description(
            name="hidden_width",
            facts={"achieved": achieved, "width": self.width, "full": self.full},
            done="Shrunk",
            outcome=f"its residual stream has {self.width} of its {self.full} dimensions.",
            rows={
                "dimensions of the residual stream removed": f"{achieved:.4f}",
                "dimensions of the residual stream": f"{self.width} of {self.full}",
            },
            unit="dimensions of the residual stream",
            noun="width",
            sizes=(self.width,) * self.blocks,
            full=self.full,
            achieved=achieved,
        )
