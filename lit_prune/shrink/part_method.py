"""The base class of methods that make one part of every block smaller, and the cut of several parts at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream, on_device
from lit_prune.errors import InputError
from lit_prune.models.families import Block, dense_family
from lit_prune.models.remote_code.modeling_shrunk import LayerConfig, layer_config
from lit_prune.progress import track
from lit_prune.pruning.base import Method, Propagate
from lit_prune.reconstruct.reconstruction import Reconstruction, reconstructing


class PartCut(ABC):
    """The cut of one part, block by block.

    Attributes:
        compares: Whether it needs the outputs of the dense blocks.
        behind_attention: Whether the part is behind the attention of its block, which the cut leaves as it is.
    """

    compares: bool = False
    behind_attention: bool = True

    @abstractmethod
    def cut(self, block: Block, config: Any, stream: Stream, targets: Sequence[Tensor] | None) -> LayerConfig | None:
        """Makes the part of ``block`` smaller, in place, and returns the config that it has now; None if it stays.

        The modules of the block adopt the sizes of that config.

        Args:
            block: The block, on the stream's device.
            config: Its config, with the sizes that other parts of it have already.
            stream: The stream in front of the block.
            targets: The output of the dense block behind dense ones for every batch, if the cut ``compares``.
        """

    @abstractmethod
    def finish(self) -> list[float]:
        """Records the structure in the model, and returns the share that each block has lost."""


def cannot_shrink(model: PreTrainedModel, method: str, reason: str) -> InputError:
    """Returns the error for a family whose part a method cannot make smaller."""
    family = dense_family(model.config)
    return InputError(f"`pruning.method` {method} cannot shrink the family {family!r}: {reason}.")


@dataclass(frozen=True)
class PartMethod(Method):
    """A method that makes one part of every block smaller, and can do so beside others as a part of ``Shrink``."""

    needs_text: ClassVar[bool] = True
    chooses_linears: ClassVar[bool] = False
    changes_shapes: ClassVar[bool] = True
    supports_reconstruction: ClassVar[bool] = True
    supports_parameters: ClassVar[bool] = True
    can_be_part: ClassVar[bool] = True
    for_fewer: ClassVar[str] = "Shrink removes other parts too, Depth blocks, and HiddenWidth dimensions"
    propagate: ClassVar[Propagate] = "pruned"  # type: ignore[misc]

    @abstractmethod
    def begin(
        self, model: PreTrainedModel, blocks: Sequence[Block], *, rates: Sequence[float], stream: Stream
    ) -> PartCut:
        """Returns the cut of all blocks at ``rates``.

        Args:
            model: The causal LM, in eval mode.
            blocks: Its blocks.
            rates: The share that each block is to lose.
            stream: The stream of the calibration batches, in front of the first block.
        """

    @torch.no_grad()
    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        statistics: Sequence[BlockStatistics],
        device: torch.device,
        stream: Callable[[], Stream],
        reconstruction: Reconstruction | None = None,
    ) -> list[float]:
        """Shrinks one block after the other, each behind those that are shrunk; see :meth:`Method.apply`."""
        residual = stream() if reconstruction is None else reconstruction.stream
        cut = self.begin(model, blocks, rates=rates, stream=residual)
        cut_blocks(model, blocks, [cut], stream=residual, device=device, reconstruction=reconstruction)
        return cut.finish()


def cut_blocks(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    cuts: Sequence[PartCut],
    *,
    stream: Stream,
    device: torch.device,
    reconstruction: Reconstruction | None,
) -> None:
    """Cuts all parts of one block after the other, each behind the parts and blocks that are cut before.

    Args:
        model: The causal LM.
        blocks: Its blocks.
        cuts: The cuts of the parts, in the order in which they are made in a block, those of the attention first.
        stream: The stream in front of the first block; it advances behind the cut blocks.
        device: Device on which a block computes.
        reconstruction: The reconstruction of the blocks, whose ``stream`` it then is.
    """
    given = None if reconstruction is None else reconstruction.dense  # which advances by itself
    dense = (given or stream.copy()) if any(cut.compares for cut in cuts) else None
    note = None if reconstruction is None else reconstruction.note
    of_attention = [cut for cut in cuts if not cut.behind_attention]
    for block in track(blocks, "Shrinking blocks", note):
        config = layer_config(model.config.get_text_config(), block.index)
        advances = reconstruction is None and block is not blocks[-1]
        with on_device(block, device, changes=True), reconstructing(reconstruction, block), ExitStack() as opened:
            if dense is not None and dense is not given:
                dense.run(block)
            for index, cut in enumerate(cuts):
                if advances and index == len(of_attention):
                    opened.enter_context(stream.once(attention_of(block)))
                targets = dense.hidden if dense is not None and cut.compares else None
                config = cut.cut(block, config, stream, targets) or config
            if advances:
                stream.run(block)


def attention_of(block: Block) -> list[nn.Module]:
    """Returns the module of a block that is its attention; none if no module is named so."""
    names = {name.partition(".")[0] for name in block.linears if in_attention(name)}
    return [block.module.get_submodule(name) for name in sorted(names)]


def in_attention(name: str) -> bool:
    """Returns whether the linear of a block with that name is in its attention.

    >>> in_attention("self_attn.o_proj"), in_attention("attention.dense"), in_attention("mlp.down_proj")
    (True, True, False)
    """
    parent = name.partition(".")[0]
    return "attn" in parent or "attention" in parent
