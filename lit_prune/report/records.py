"""What is recorded of a cut, and of a model that is trained without one: the facts that a report is made of.

Both travel in the callback's checkpoint state, as plain dicts that ``torch.load(weights_only=True)`` reads. Their JSON
form, and that of every other record in report.json, is :func:`to_plain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from lit_prune.evaluation.perplexity import Measurement, Protocol
from lit_prune.evaluation.speed import Speed

OMIT = object()


def json_form(*, key: str | None = None, none_as: Any = None) -> dict[str, Any]:
    """Returns the metadata of a field whose JSON form is not its name and its value.

    Args:
        key: Its name there.
        none_as: What stands for None; ``OMIT`` leaves the field out.
    """
    return {"key": key, "none_as": none_as}


def to_plain(value: Any) -> Any:
    """Returns ``value`` with every dataclass in it turned into a dict, in the order of its fields, and tuples to lists.

    >>> to_plain({"protocol": Protocol("val.txt", 4, 16, 60, "float32")})["protocol"]["tokens"]
    60
    """
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if not is_dataclass(value) or isinstance(value, type):
        return value
    plain: dict[str, Any] = {}
    for one in fields(value):
        item = getattr(value, one.name)
        item = one.metadata.get("none_as") if item is None else item
        if item is not OMIT:
            plain[one.metadata.get("key") or one.name] = to_plain(item)
    return plain


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
        """Returns the size that :func:`to_plain` made ``stored`` of."""
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
        """Returns the record that :func:`to_plain` made ``stored`` of."""
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
        """Returns the record that :func:`to_plain` made ``stored`` of."""
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
