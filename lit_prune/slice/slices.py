"""Slices: the structure of a sliced model, whose residual stream has a width of its own in every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from transformers import PreTrainedModel

from lit_prune.models.remote_code.modeling_sliced import SlicedCausalLM, take_shape
from lit_prune.models.structure import IMPORT, Description, Structure
from lit_prune.slice.sizes import rates_from_sizes


@final
@dataclass(frozen=True)
class Slices(Structure):
    """The widths of the residual stream, which are also `slice_sizes` in the config of the sliced model.

    Attributes:
        sizes: The width that each block reads, then the width that the head reads.
        untied_head: Whether slicing untied the head from the embedding.
    """

    sizes: Sequence[int]
    untied_head: bool

    def rebuild(self, model: PreTrainedModel) -> None:
        """Turns a dense model into a sliced one of these widths; a sliced model is left unchanged."""
        if not isinstance(model, SlicedCausalLM):
            take_shape(model, self.sizes)

    def describe(self, model: PreTrainedModel) -> Description:
        """Returns the widths, the achieved slice and the parameters of the shortcut matrices."""
        full, widths = model.config.hidden_size, list(self.sizes[:-1])
        removed = rates_from_sizes(widths, full)
        achieved = sum(removed) / len(removed)
        shortcuts = sum(p.numel() for name, p in model.named_parameters() if "shortcut" in name)
        span = f"{min(widths)} to {max(widths)}"
        return Description(
            name="slice",
            facts={
                "achieved": achieved,
                "hidden_size": full,
                "sizes": widths,
                "head_size": self.sizes[-1],
                "shortcut_parameters": shortcuts,
                "untied_head": self.untied_head,
            },
            rows={
                "dimensions of the residual stream removed, mean over blocks": f"{achieved:.4f}",
                "widths of the blocks": f"{span} of {full}",
            },
            done="Sliced",
            outcome=(
                f"the residual stream has {span} of its {full} dimensions, {achieved:.2%} less in the mean. Shortcut "
                f"matrices ({shortcuts:,} parameters) and a head of its own are part of it."
            ),
            noun="width",
            sizes=tuple(widths),
            full=full,
            unit="dimensions of the residual stream",
            achieved=achieved,
            loading=IMPORT,
            added_parameters=shortcuts,
        )
