"""Slices: the structure of a sliced model, whose residual stream has a width of its own in every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from transformers import PreTrainedModel

from lit_prune.models.modeling_sliced import SlicedCausalLM, take_shape
from lit_prune.models.structure import Description, Structure
from lit_prune.slice.sizes import slices


@final
@dataclass(frozen=True)
class Slices(Structure):
    """The widths of the residual stream, which the sliced model's config has as `slice_sizes` too.

    Attributes:
        sizes: The width that each block reads, and at the end the one that the head reads.
        untied_head: Whether the head was tied to the embedding before.
    """

    sizes: Sequence[int]
    untied_head: bool

    def rebuild(self, model: PreTrainedModel) -> None:
        """Makes a dense model a sliced one of these widths."""
        if not isinstance(model, SlicedCausalLM):
            take_shape(model, self.sizes)

    def describe(self, model: PreTrainedModel) -> Description:
        """Returns the widths, and the parameters of the shortcut matrices."""
        full, widths = model.config.hidden_size, list(self.sizes[:-1])
        removed = slices(widths, full)
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
                "slice achieved, mean over blocks": f"{achieved:.4f}",
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
            loading="import lit_prune  # or pass trust_remote_code=True below",
            added_parameters=shortcuts,
        )
