"""What a mask method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

Propagate = Literal["dense", "pruned"]


class Method(ABC):
    """How the weights of one linear go.

    Attributes:
        needs: The statistics that :meth:`prune` reads, of those in ``lit_prune.calibrate``.
        propagate: `dense`: the statistics of the one pass over the unpruned model serve for scoring and pruning alike.
            `pruned`: each block sees what the pruned blocks before it give, which takes two passes more.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    propagate: Propagate

    @abstractmethod
    def prune(self, weight_OI: Tensor, norm_I: Tensor | None, rate: float) -> Tensor:
        """Returns a pruned copy of one weight, removed entries exactly 0; the input is left as it is.

        Args:
            weight_OI: The weight, (out, in).
            norm_I: ||X_j||, root mean square of each input channel, fp32; None where ``needs`` does not ask for it.
            rate: Share to remove, in [0, 1].
        """
