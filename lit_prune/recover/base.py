"""The interface of a recovery."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from lit_prune.recover.adapter import fold_adapter

# the forms of an export, see ``export.plan.form_of``
ExportForm = Literal["full precision", "quantised", "merged", "requantised", "adapter"]


class Recovery(ABC):
    """A way to train a model after a cut (or before the first) under which pruned weights stay pruned.

    Attributes:
        folds_under_masks: Whether :meth:`detach` keeps the zeros of a masked model.
        quantises: Whether :meth:`attach` quantises the weights, so that the model cannot be pruned afterwards.
        leaves_base: Whether no weight of the model changes, in value or type, before :meth:`detach`.
    """

    folds_under_masks: ClassVar[bool] = False
    quantises: ClassVar[bool] = False
    leaves_base: ClassVar[bool] = False

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 (most have nothing to check)
        """Raises InputError if the settings do not fit ``model``."""

    def check_sliced(self) -> None:  # noqa: B027
        """Raises InputError if the settings do not fit a model that will be sliced."""

    def export_form(self, masked: bool) -> ExportForm | None:
        """Returns the form in which a model is exported after this recovery; None where only the model itself tells.

        Args:
            masked: Whether weights of the model are masked.
        """
        return None

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> None:
        """Prepares ``model`` for training, in place: exactly the parameters that are trained require gradients."""

    def detach(self, model: PreTrainedModel) -> None:
        """Merges an adapter into the weights of ``model`` and removes it, in place, so that it can be cut again."""
        fold_adapter(model)
