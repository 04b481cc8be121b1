"""MLPWidth: fewer channels in the MLP of every block, by Optimal Brain Surgeon with whole channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from lit_prune.models.linears import PrunableLinear
from lit_prune.shrink.base import UnitMethod
from lit_prune.shrink.units.parts import Part, mlp_of
from lit_prune.shrink.units.sizes import PartSizes


@final
@dataclass(frozen=True)
class MLPWidths(PartSizes):
    """The number of channels of each MLP."""

    name: ClassVar[str] = "mlp_width"
    noun: ClassVar[str] = "channels of the MLP"
    find: ClassVar[Callable[[Mapping[str, PrunableLinear], Any], Part]] = staticmethod(mlp_of)


@final
@dataclass(frozen=True)
class MLPWidth(UnitMethod):
    """Removes the channels of each MLP that its output needs least, and refits the weights of the others.

    With W the transposed weight of the linear that reads the channels and H the damped Gram matrix of its inputs behind
    the blocks that are already shrunk, channel j costs sum_o W_jo^2 / [H^-1]_jj. The cheapest are removed in rounds,
    after each of which W and H^-1 are updated; see ``shrink.units.obs``. The linears that write the channels lose rows.
    Before that, W is changed to make up for a share of what the output of the block lacks because the blocks before
    have been shrunk (after QEP, arXiv 2504.09629; see ``shrink.units.obs.corrected``).
    Equal widths give a plain model of the family with a smaller `intermediate_size`.

    Args:
        multiple: Number of which the width is a multiple, unless a block keeps all channels; 64 is fast, and fits
            the formats with 8 and 4 bits.
        rounds: Number of rounds.
        damping: Share of the mean of H's diagonal that is added to it. Massive activations raise that mean far above
            the variance of most channels: 0.01 removes some from the last block that predictions need.
        compensate: Whether W is updated. If not, the score is H_jj * sum_o W_jo^2, the energy of the channel's output.
        correct_errors: Whether W also makes up for the errors of the blocks before, as far as that helps in batches
            that it was not fitted to. It takes one more pass over the windows, needs at least two batches and
            `compensate`, and is left out where the MLP's output is not added to the residual stream as it is (Gemma 2).

    Raises:
        InputError: for a multiple or rounds below 1, or a damping that is not positive.
    """

    multiple: int = 64
    rounds: int = 16
    damping: float = 0.001
    compensate: bool = True
    correct_errors: bool = True

    sizes_class: ClassVar[type[PartSizes]] = MLPWidths

    @property
    def corrects(self) -> bool:
        """Whether the weights of a block make up for the error that the blocks before have left."""
        return self.compensate and self.correct_errors
