"""The records that a report is made from: of each cut, or of the model before a training without cuts.

The callback's checkpoint state stores them as the plain dicts of ``plain.to_plain``, since ``torch.load`` with
``weights_only=True`` reads no classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from lit_prune.evaluation.perplexity import Measurement, Protocol
from lit_prune.evaluation.speed import Speed
from lit_prune.reconstruct.losses import BlockLosses
from lit_prune.report.plain import OMIT, json_form
from lit_prune.target_perplexity import FoundSparsity, SparsityTrial


@dataclass(frozen=True)
class ModelSize:
    """The size of a model before or after a cut that changes its shape.

    Attributes:
        parameters: Number of parameters, tied weights counted once.
        bytes: Bytes of the parameters in memory.
        speed: Tokens per second; None if it was not measured.
    """

    parameters: int
    bytes: int
    speed: Speed | None

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ModelSize:
        """Returns the size whose JSON form is ``stored``."""
        speed = stored["speed"]
        return cls(stored["parameters"], stored["bytes"], None if speed is None else Speed(**speed))


@dataclass(frozen=True)
class SearchRecord:
    """The cost and the result of a search for rates.

    Attributes:
        evaluations: Number of forward passes of one calibration window through the whole model.
        sweeps: Number of sweeps over the blocks.
        windows: Number of windows that the two losses are measured on.
        loss_start: Mean loss over the predicted tokens of those windows, under the rates that the search started from.
        loss_end: The same under the rates that were chosen.
        start: The start that the search chose, such as `MLPWidth first`; None if it had one alone.
    """

    evaluations: int
    sweeps: int
    windows: int
    loss_start: float
    loss_end: float
    start: str | None = field(default=None, metadata=json_form(none_as=OMIT))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> SearchRecord | None:
        """Returns the record whose JSON form is ``stored``; None for the empty dict, of a cut without a search."""
        return cls(**stored) if stored else None


@dataclass(frozen=True)
class CutRecord:
    """The record of one cut: its settings, its result, and the measurements before and after it.

    Attributes:
        step: Optimizer step before which the cut was made.
        perplexity: Perplexities `before` and `after` the cut, and `quantised`, after the recovery quantised the
            weights.
        seconds: Duration of each part, by name.
        protocol: Text and windows of the perplexities; None if none was measured.
        calibration: Settings of the calibration text.
        size: Sizes `before` and `after` a cut that changed shapes; else empty.
        recipe: The recipe, see ``recipe.recipe_record``.
        scores: Score of each block.
        rates: Planned rate of each block.
        target: Planned mean of the rates, weighted by the blocks' sizes in the method's unit.
        achieved: Achieved rate of each block.
        sparsity: Achieved rate over all blocks.
        search: Record of the search for rates; None if there was none.
        sparsity_before: Share that was removed before the cut; 0 for a dense model.
        masked_before: Whether the model was masked before the cut.
        reshaped_before: Whether the shape of the model was changed before the cut.
        reconstruction: Losses of every block before and after its reconstruction; empty without one.
        linears: Planned rates of each block's linears by name; None if they all have the block's rate.
        parts: Planned rates of each block's parts by name, for `Shrink`; None if only the blocks have rates.
        found: The search for the sparsity of a perplexity; None if the sparsity was given.
    """

    step: int
    perplexity: Mapping[str, float]
    seconds: Mapping[str, float]
    protocol: Protocol | None
    calibration: Mapping[str, Any]
    size: Mapping[str, ModelSize]
    recipe: Mapping[str, Any]
    scores: list[float]
    rates: list[float]
    target: float
    achieved: list[float]
    sparsity: float
    search: SearchRecord | None = field(default=None, metadata=json_form(none_as={}))
    sparsity_before: float = 0.0
    masked_before: bool = False
    reshaped_before: bool = False
    reconstruction: list[BlockLosses] = field(default_factory=list)
    linears: list[dict[str, float]] | None = field(default=None, metadata=json_form(none_as=OMIT))
    parts: list[dict[str, float]] | None = field(default=None, metadata=json_form(none_as=OMIT))
    found: FoundSparsity | None = field(default=None, metadata=json_form(none_as=OMIT))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> CutRecord:
        """Returns the record whose JSON form is ``stored``."""
        plain = dict(stored)
        if found := plain.pop("found", None):
            trials = tuple(SparsityTrial(**trial) for trial in found["trials"])
            plain["found"] = FoundSparsity(**{**found, "trials": trials})
        return cls(
            protocol=_protocol(plain.pop("protocol")),
            size={when: ModelSize.from_dict(size) for when, size in plain.pop("size").items()},
            search=SearchRecord.from_dict(plain.pop("search")),
            reconstruction=[BlockLosses(**losses) for losses in plain.pop("reconstruction", ())],
            **plain,
        )


@dataclass(frozen=True)
class Baseline:
    """The record of a model before a training without cuts.

    Attributes:
        step: Optimizer step at which the training starts, 0.
        record: Record of what was done to the model before, see ``models.structure``.
        perplexity: Perplexity `before` the training, and `quantised`, after the recovery quantised the weights.
        seconds: Duration of each measurement.
        protocol: Text and windows of the perplexities; None if none was measured.
        achieved: Share of zeros in the pruned linears of each block; empty if nothing is masked.
        sparsity: Share of zeros in the pruned linears of all blocks.
    """

    step: int
    record: Mapping[str, Any]
    perplexity: Mapping[str, float]
    seconds: Mapping[str, float]
    protocol: Protocol | None
    achieved: list[float]
    sparsity: float

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Baseline:
        """Returns the record whose JSON form is ``stored``."""
        plain = dict(stored)
        return cls(protocol=_protocol(plain.pop("protocol")), **plain)


Record = TypeVar("Record", CutRecord, Baseline)


def with_perplexity(record: Record, name: str, measured: Measurement) -> Record:
    """Returns ``record`` with one more perplexity, and the seconds that measuring it took."""
    return replace(
        record,
        perplexity={**record.perplexity, name: measured.perplexity},
        seconds={**record.seconds, f"perplexity_{name}": measured.seconds},
    )


def _protocol(stored: Mapping[str, Any] | None) -> Protocol | None:
    return None if stored is None else Protocol(**stored)
