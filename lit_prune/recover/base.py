"""What a recovery is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from transformers import PreTrainedModel


class Recovery(ABC):
    """What is trained after the cut, so that the model heals and the pruned weights stay pruned."""

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 (most have nothing to check)
        """Raises InputError where the settings do not fit ``model``, before anything is done to it."""

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> None:
        """Makes ``model`` ready to be trained, in place: what is to learn requires gradients, nothing else does."""
