"""The record of a cut, and that of a model before a training without one: the facts that a report is made of.

Both are in the callback's checkpoint state, as the plain dicts that ``plain.to_plain`` makes of them, which
``torch.load(weights_only=True)`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from lit_prune.evaluation.perplexity import Measurement, Protocol
from lit_prune.evaluation.speed import Speed
from lit_prune.report.plain import json_form


@dataclass(frozen=True)
class ModelSize:
    """The size of a model whose shape a cut changes.

    Attributes:
        parameters: How many there are, tied weights counted once.
        bytes: What they take in memory.
        speed: Tokens per second; None where nothing is measured.
    """

    parameters: int
    bytes: int
    speed: Speed | None

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ModelSize:
        """Returns the size that ``to_plain`` made ``stored`` of."""
        speed = stored["speed"]
        return cls(stored["parameters"], stored["bytes"], None if speed is None else Speed(**speed))


@dataclass(frozen=True)
class SearchRecord:
    """How a search of the rates went.

    Attributes:
        evaluations: How often one calibration window ran through the whole model.
        generations: How many generations of candidates there were.
        windows: On how many windows start and end were compared.
        loss_start: Mean loss over the predicted tokens of those windows, under the rates of the start.
        loss_end: The same under the rates that were chosen.
    """

    evaluations: int
    generations: int
    windows: int
    loss_start: float
    loss_end: float

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> SearchRecord | None:
        """Returns the record of a search, None for the empty dict of a cut without one."""
        return cls(**stored) if stored else None


@dataclass(frozen=True)
class CutRecord:
    """What one cut did, and what was measured around it.

    Attributes:
        step: The optimizer step before which the cut came.
        perplexity: `before` and `after` the cut; `quantised`, once the recovery has quantised the weights.
        seconds: How long each part took, by name.
        protocol: What the perplexities were measured on; None where none was.
        calibration: The settings of the calibration text.
        size: `before` and `after`, where the cut changed shapes.
        recipe: See ``recipe.recipe_record``.
        scores: One score a block.
        rates: The share that each block was to give.
        target: The mean that the rates were to have, weighted by what each block has to give.
        achieved: The share that each block has given.
        sparsity: The same over all blocks.
        search: How the search of the rates went; None without one.
        sparsity_before: The share that had been removed before the cut; 0 for a dense model.
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
    sparsity_before: float = field(default=0.0, metadata=json_form(key="found"))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> CutRecord:
        """Returns the record that ``to_plain`` made ``stored`` of."""
        plain = dict(stored)
        return cls(
            protocol=_protocol(plain.pop("protocol")),
            size={when: ModelSize.from_dict(size) for when, size in plain.pop("size").items()},
            search=SearchRecord.from_dict(plain.pop("search")),
            sparsity_before=plain.pop("found"),
            **plain,
        )


@dataclass(frozen=True)
class Baseline:
    """A model before a training that cuts nothing.

    Attributes:
        step: 0, where that training starts.
        record: What was done to the model before, see ``models.structure``.
        perplexity: `before` the training; `quantised`, once the recovery has quantised the weights.
        seconds: How long each measurement took.
        protocol: What the perplexities were measured on; None where none was.
        achieved: The share of zeros in the pruned linears of each block; empty where nothing is masked.
        sparsity: The same over all blocks.
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
        """Returns the record that ``to_plain`` made ``stored`` of."""
        plain = dict(stored)
        return cls(protocol=_protocol(plain.pop("protocol")), **plain)


Record = TypeVar("Record", CutRecord, Baseline)


def with_perplexity(record: Record, name: str, measured: Measurement) -> Record:
    """Returns ``record`` with one more perplexity, and the seconds that it took to measure."""
    return replace(
        record,
        perplexity={**record.perplexity, name: measured.perplexity},
        seconds={**record.seconds, f"perplexity_{name}": measured.seconds},
    )


def _protocol(stored: Mapping[str, Any] | None) -> Protocol | None:
    return None if stored is None else Protocol(**stored)
