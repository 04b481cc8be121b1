"""What a recovery is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from transformers import PreTrainedModel

from lit_prune.recover.adapter import fold_adapter


class Recovery(ABC):
    """What is trained after a cut, so that the model heals and the pruned weights stay pruned; or before the first.

    Attributes:
        folds_under_masks: Whether :meth:`detach` keeps the zeros of a masked model.
        quantises: Whether :meth:`attach` quantises the weights, so that nothing can be cut after it.
        leaves_base: Whether all weights stay what the cut left, to the bit and in their type, until :meth:`detach`.
    """

    folds_under_masks: ClassVar[bool] = False
    quantises: ClassVar[bool] = False
    leaves_base: ClassVar[bool] = False

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 (most have nothing to check)
        """Raises InputError where the settings do not fit ``model``, before anything is done to it."""

    def check_sliced(self) -> None:  # noqa: B027
        """Raises InputError where the settings do not fit a model that is to be sliced."""

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> None:
        """Makes ``model`` ready to be trained, in place: what is to learn requires gradients, nothing else does."""

    def detach(self, model: PreTrainedModel) -> None:
        """Folds what was learnt into the weights of ``model``, in place, and leaves no adapter: the next cut comes."""
        fold_adapter(model)
