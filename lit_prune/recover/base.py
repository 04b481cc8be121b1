"""The interface of a recovery."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from lit_prune.recover.adapter import merge_adapter

# the forms of an export, see ``export.plan.form_of``
ExportForm = Literal["full precision", "quantised", "merged", "requantised", "adapter"]


class Recovery(ABC):
    """A way to train a model after a cut, or before the first one, in which pruned weights stay pruned.

    Attributes:
        merge_keeps_zeros: Whether :meth:`detach` preserves the zeros of a masked model.
        quantises: Whether :meth:`attach` quantises the weights, after which the model cannot be pruned.
        leaves_base: Whether the model's own weights keep their values and type until :meth:`detach`.
    """

    merge_keeps_zeros: ClassVar[bool] = False
    quantises: ClassVar[bool] = False
    leaves_base: ClassVar[bool] = False

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 (most have nothing to check)
        """Raises InputError if the settings do not fit ``model``."""

    def check_sizes(self, method: str, multiple: int) -> None:  # noqa: B027
        """Checks that the settings fit a model that a cut gives other sizes.

        Args:
            method: Name of the pruning method.
            multiple: Number of which every size is a multiple that the cut changes.

        Raises:
            InputError: if they do not.
        """

    def export_form(self, masked: bool) -> ExportForm | None:
        """Returns the form in which a model is exported after this recovery; None where only the model itself tells.

        Args:
            masked: Whether weights of the model are masked.
        """
        return None

    def check_detach(self, model: PreTrainedModel) -> None:  # noqa: B027
        """Raises InputError if :meth:`detach` would change more of ``model`` than the weights that are trained."""

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> None:
        """Prepares ``model`` for training in place; exactly the parameters to train require gradients afterwards."""

    def detach(self, model: PreTrainedModel) -> None:
        """Merges the adapter, if there is one, into the weights of ``model``, in place, so that it can be cut again."""
        merge_adapter(model)
