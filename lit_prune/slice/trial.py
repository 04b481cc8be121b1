"""Trials of slices: a copy of the model that is rotated once at full width and then run at any widths.

Suffixes: N vocabulary, O rows and I columns of a weight, D full width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.models.remote_code.modeling_sliced import SlicedLayer, Step, set_weight, sliced_class
from lit_prune.search.trial import Trial

Whole = tuple[nn.Module, Tensor, Tensor | None]


class SlicedTrial(Trial):
    """A rotated model that reads and writes only the leading axes of the stream, as many as the rates leave.

    It computes the same as a sliced model with these axes, at the same speed: every weight is a view of the full one.
    The actual cut is slightly better, since it computes the axes of a block from the stream of already sliced ones.

    Args:
        model: A sliced model of full width, whose weights are replaced.
        batches: The calibration batches.
        granularity: For each block, the number of dimensions of which every change is a multiple.
        widths: Function of the rates that returns the width that each block reads, then that of the head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        granularity: Sequence[int],
        widths: Callable[[Sequence[float]], list[int]],
    ) -> None:
        layout = sliced_class(model).layer_class.layout
        super().__init__(model, layout.layers, batches)
        self.granularity, self.widths = granularity, widths
        self._embeddings = [_whole(model.get_submodule(name)) for name in layout.embeddings]
        self._layers = [_WholeLayer(layer) for layer in model.get_submodule(layout.layers).children()]
        self._head = _whole(model.get_output_embeddings())

    def take(self, rates: Sequence[float]) -> None:
        """Sets the width of the embeddings, every block and the head."""
        widths = self.widths(rates)
        for embedding, weight_ND, _ in self._embeddings:
            set_weight(embedding, weight_ND[:, : widths[0]])
        for layer, (width, following) in zip(self._layers, pairwise(widths), strict=True):
            layer.take(width, following)
        _read(self._head, widths[-1])

    def settings(self, rates: Sequence[float]) -> Sequence[Hashable]:
        """Returns, for each block, the widths that it reads and writes."""
        return list(pairwise(self.widths(rates)))


class _WholeLayer:
    """The full-width weights of a layer, which itself uses a part of them."""

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
        """Makes the layer read ``width`` axes and its last step write ``following``."""
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
