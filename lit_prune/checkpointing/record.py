"""The record of a run that a checkpoint holds under our key, beside the weights and Lightning's own state."""

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
    """The teacher of a run: its weights, or what it is made from again.

    Args:
        digest: SHA-256 of the dense model, where the source has it; None where `weights` are stored.
        weights: The teacher's own weights, by name; None where the source has them.
    """

    digest: str | None
    weights: Mapping[str, Tensor] | None

    def to_dict(self) -> dict[str, Any]:
        """Returns it in types that a checkpoint can hold."""
        return {"digest": self.digest, "weights": None if self.weights is None else dict(self.weights)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TeacherRecord:
        """Returns what :meth:`to_dict` wrote."""
        return cls(stored["digest"], stored["weights"])


@final
@dataclass(frozen=True)
class RunRecord:
    """What a run needs to go on, beside the weights and Lightning's own state.

    Args:
        settings: What a resumed run must have in common, by field; None where no DynamicPruningCallback took part.
        snapshot: The structure of the LLM; None where nothing was done to it.
        dropped_weights: The weights that are not in the checkpoint, by name in the LLM; None where all are.
        gradient_masks: Which weights training keeps at zero, by parameter, as bits.
        teacher: The teacher; None without one, and before the first cut.
        optimizer_step: The optimizer step at which PrunableLM made its optimizer; None for another module.
    """

    settings: Settings | None = None
    snapshot: Snapshot | None = None
    dropped_weights: Mapping[str, DroppedWeight] | None = None
    gradient_masks: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: TeacherRecord | None = None
    optimizer_step: int | None = None

    def write_to(self, checkpoint: dict[str, Any]) -> None:
        """Puts the record into ``checkpoint``, in types that ``torch.load(weights_only=True)`` reads."""
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
        """Returns the record in ``checkpoint``; an empty one where there is none."""
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
