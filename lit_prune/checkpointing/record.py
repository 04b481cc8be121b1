"""The record of a run in a checkpoint, which holds what neither the weights nor Lightning's own state do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from lit_prune.checkpointing.weights import DroppedWeight
from lit_prune.models.structure import KEY
from lit_prune.recover import Snapshot

Settings = dict[str, Any]


@final
@dataclass(frozen=True)
class TeacherRecord:
    """The teacher of a run: its weights, or the digest of the model that it can be built from again.

    Args:
        digest: SHA-256 of the dense model, if that can be loaded from its source; None if `weights` are stored.
        weights: The teacher's weights, by name; None if they can be loaded from the source.
    """

    digest: str | None
    weights: Mapping[str, Tensor] | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in types that a checkpoint can hold."""
        return {"digest": self.digest, "weights": None if self.weights is None else dict(self.weights)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TeacherRecord:
        """Returns the teacher's record from what :meth:`to_dict` returned."""
        return cls(stored["digest"], stored["weights"])


@final
@dataclass(frozen=True)
class RunRecord:
    """State that a run needs to resume, besides the weights and Lightning's own state.

    Args:
        settings: Settings that a resumed run must share, by field; None without a DynamicPruningCallback.
        snapshot: Structure of the LLM; None if that was not changed.
        dropped_weights: Weights that the checkpoint leaves out, by their name in the LLM; None if it holds all.
        gradient_masks: Masks of the weights that training keeps at zero, by parameter, packed as bits.
        teacher: The teacher of the distillation; None without one, and before the first cut.
        optimizer_step: Optimizer step at which PrunableLM made its optimizer; None for any other module.
    """

    settings: Settings | None = None
    snapshot: Snapshot | None = None
    dropped_weights: Mapping[str, DroppedWeight] | None = None
    gradient_masks: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: TeacherRecord | None = None
    optimizer_step: int | None = None

    def write_to(self, checkpoint: dict[str, Any]) -> None:
        """Adds the record to ``checkpoint``, in types that ``torch.load(weights_only=True)`` can read."""
        dropped = self.dropped_weights
        checkpoint[KEY] = {
            "settings": self.settings,
            "snapshot": None if self.snapshot is None else self.snapshot.to_dict(),
            "dropped_weights": None if dropped is None else {name: w.to_dict() for name, w in dropped.items()},
            "gradient_masks": dict(self.gradient_masks),
            "teacher": None if self.teacher is None else self.teacher.to_dict(),
            "optimizer_step": self.optimizer_step,
        }

    @classmethod
    def read_from(cls, checkpoint: Mapping[str, Any]) -> RunRecord:
        """Returns the record in ``checkpoint``, or an empty record if it has none."""
        stored = checkpoint.get(KEY)
        if stored is None:
            return cls()
        snapshot, dropped, teacher = stored["snapshot"], stored["dropped_weights"], stored["teacher"]
        return cls(
            settings=stored["settings"],
            snapshot=None if snapshot is None else Snapshot.from_dict(snapshot),
            dropped_weights=None if dropped is None else {n: DroppedWeight.from_dict(w) for n, w in dropped.items()},
            gradient_masks=stored["gradient_masks"],
            teacher=None if teacher is None else TeacherRecord.from_dict(teacher),
            optimizer_step=stored["optimizer_step"],
        )
