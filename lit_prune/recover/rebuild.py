"""Snapshot: the shapes and modules of a model, from which a checkpoint's model is rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from transformers import PreTrainedModel

from lit_prune.masks.freeze import freeze_zeros, freezes_zeros
from lit_prune.models import structure
from lit_prune.models.quantised import make_loadable, quantisation
from lit_prune.models.structure import Structure, structures_in
from lit_prune.recover.adapter import adapter_config, add_adapter, has_masked_adapter
from lit_prune.recover.quantise import quantise


@dataclass(frozen=True)
class Snapshot:
    """The shapes and modules of a model that was pruned and prepared for training, without its weights.

    Attributes:
        record: The model's record of what was done to it, see ``models.structure``.
        quantisation: The arguments of ``quantise``; None in full precision.
        adapter: The adapter's peft config, JSON-serialisable; None without an adapter.
        masked_adapter: Whether the adapter preserves the zeros of the weights under it.
        trained: Names of the parameters that require gradients.
        freezes_zeros: Whether gradient masks keep the zeros of the weights, see ``masks.freeze``.
    """

    record: dict[str, Any]
    quantisation: dict[str, Any] | None
    adapter: dict[str, Any] | None
    masked_adapter: bool
    trained: tuple[str, ...]
    freezes_zeros: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Snapshot:
        """Returns the snapshot of ``model``."""
        return cls(
            record=structure.record(model),
            quantisation=quantisation(model),
            adapter=adapter_config(model),
            masked_adapter=has_masked_adapter(model),
            trained=tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad),
            freezes_zeros=freezes_zeros(model),
        )

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The changes of the model's shape."""
        return structures_in(self.record)

    def to_dict(self) -> dict[str, Any]:
        """Returns the snapshot in types that JSON and ``torch.load(weights_only=True)`` support."""
        return {
            "record": self.record,
            "quantised": self.quantisation,
            "adapter": self.adapter,
            "masked_adapter": self.masked_adapter,
            "trained": list(self.trained),
            "freezes_zeros": self.freezes_zeros,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Snapshot:
        """Returns the snapshot from the result of :meth:`to_dict`, which may have further entries."""
        return cls(
            record=stored["record"],
            quantisation=stored["quantised"],
            adapter=stored["adapter"],
            masked_adapter=stored["masked_adapter"],
            trained=tuple(stored["trained"]),
            freezes_zeros=stored["freezes_zeros"],
        )

    def rebuild(self, model: PreTrainedModel) -> None:
        """Gives ``model``, a copy of the dense model, the shapes and modules of the snapshot, in place.

        The weights of the snapshot's model can be loaded into it afterwards. A second call changes nothing.
        """
        for change in sorted(self.structures, key=lambda change: not change.rebuilt_first):
            change.rebuild(model)
        structure.write(model, **self.record)
        if self.quantisation is not None and quantisation(model) is None:
            quantise(model, **self.quantisation)
        make_loadable(model)
        if self.adapter is not None and adapter_config(model) is None:
            add_adapter(model, _peft_config(self.adapter), masked=self.masked_adapter)
        trained = set(self.trained)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        if self.freezes_zeros:
            freeze_zeros(model)


def _peft_config(fields: Mapping[str, Any]) -> PeftConfig:
    kind: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[fields["peft_type"]]
    return kind(**{key: value for key, value in fields.items() if key != "peft_type"})
