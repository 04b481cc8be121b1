"""Trial by slices: a copy of the model, rotated once at full width, of which any widths can be looked at.

Suffixes: N words, O rows and I columns of a weight, D full width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.models.modeling_sliced import SlicedLayer, Step, set_weight, sliced_class
from lit_prune.search.trial import Trial

Whole = tuple[nn.Module, Tensor, Tensor | None]


class SlicedTrial(Trial):
    """A rotated model that reads and writes the leading axes of the stream alone, as many as the rates leave.

    That is what a sliced model with these axes computes, and at its speed: every weight is a view of the whole one.
    The cut itself is a little better, since its axes are found behind the slices before them.

    Args:
        model: A sliced model of full width, whose weights are changed.
        batches: The calibration batches.
        granularity: Number of units by multiples of which each block can change.
        widths: Returns, for rates, the width that each block reads, and at the end the head's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        granularity: Sequence[int],
        widths: Callable[[Sequence[float]], list[int]],
    ) -> None:
        super().__init__(model, batches)
        self.granularity, self.widths = granularity, widths
        layout = sliced_class(model).layer_class.layout
        self._embeddings = [_whole(model.get_submodule(name)) for name in layout.embeddings]
        self._layers = [_WholeLayer(layer) for layer in model.get_submodule(layout.layers).children()]
        self._head = _whole(model.get_output_embeddings())

    def take(self, rates: Sequence[float]) -> None:
        """Gives every part of the model its width."""
        widths = self.widths(rates)
        for embedding, weight_ND, _ in self._embeddings:
            set_weight(embedding, weight_ND[:, : widths[0]])
        for layer, (width, following) in zip(self._layers, pairwise(widths), strict=True):
            layer.take(width, following)
        _read(self._head, widths[-1])


class _WholeLayer:
    """The weights of a layer at full width, of which the layer has a part."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, SlicedLayer)
        self.layer = layer
        self.steps: list[tuple[Step, list[Whole], list[Whole], Tensor]] = [
            (
                step,
                [_whole(layer.get_submodule(name)) for name in step.readers],
                [_whole(layer.get_submodule(name)) for name in step.writers],
                getattr(layer, step.shortcut).detach(),
            )
            for step in layer.layout.steps
        ]

    def take(self, width: int, following: int) -> None:
        """Reads ``width`` axes, and writes ``following`` behind the last step."""
        for step, readers, writers, shortcut_DD in self.steps:
            out = following if step is self.layer.layout.steps[-1] else width
            for reader in readers:
                _read(reader, width)
            for linear, weight_OI, bias_O in writers:
                set_weight(linear, weight_OI[:out], None if bias_O is None else bias_O[:out])
            self.layer.set_shortcut(step, shortcut_DD[:width, :out])


def _whole(module: nn.Module) -> Whole:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return module, weight.detach(), None if bias is None else bias.detach()


def _read(linear: Whole, width: int) -> None:
    module, weight_OI, bias_O = linear
    set_weight(module, weight_OI[:, :width], bias_O)
