"""The sections of a report: sparsity, shape, quantised weights, and every cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_prune.evaluation.perplexity import Protocol
from lit_prune.models.structure import Description
from lit_prune.report.plain import OMIT, json_form, to_plain
from lit_prune.report.records import CutRecord, ModelSize


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """The share of weights that was to be removed, and the share that is exactly zero.

    Attributes:
        requested: As `sparsity` of the recipe; None where no recipe is known.
        budget: What that is a share of, see ``allocate.budget``.
        target: The mean that the rates were to have.
        achieved_linears: Over the linears that were pruned.
        missed: By how much that is off the target.
        before: Over the same linears before this run; None for a dense model.
        achieved_all: Over all parameters.
        planned: The mean of the rates, where nothing was pruned yet.
    """

    requested: float | None
    budget: str | None = field(default=None, metadata=json_form(none_as=OMIT))
    target: float | None = field(default=None, metadata=json_form(none_as=OMIT))
    achieved_linears: float | None = field(default=None, metadata=json_form(none_as=OMIT))
    missed: float | None = field(default=None, metadata=json_form(none_as=OMIT))
    before: float | None = field(default=None, metadata=json_form(key="found", none_as=OMIT))
    achieved_all: float | None = field(default=None, metadata=json_form(none_as=OMIT))
    planned: float | None = field(default=None, metadata=json_form(none_as=OMIT))


@dataclass(frozen=True)
class Shape:
    """The structure that a cut gave a model, beside the model's size before and after it.

    Attributes:
        structure: See ``models.structure``.
        requested: The share that was to be removed, mean over the blocks.
        dense: The size before the cut; None where it is not known.
        pruned: The size after it.
    """

    structure: Description
    requested: float
    dense: ModelSize | None = None
    pruned: ModelSize | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the section of report.json."""
        sizes = {"dense": to_plain(self.dense), "pruned": to_plain(self.pruned)}
        return {"requested": self.requested, **self.structure.facts, **sizes}


@dataclass(frozen=True)
class Quantised:
    """How the linears were quantised for the recovery, and what is exported of them.

    Attributes:
        quantization: Such as `nf4`.
        double_quant: Whether the scales are quantised as well.
        form: In which form they are exported: `adapter`, `merged` or `requantised`; None without an adapter.
        bytes_unquantised: What the parameters would take in full precision.
    """

    quantization: str
    double_quant: bool
    form: str | None
    bytes_unquantised: int


@dataclass(frozen=True)
class CutSummary:
    """One of the cuts of a run, in the words of :class:`CutRecord`."""

    requested: float
    step: int
    target: float
    sparsity: float
    perplexity: Mapping[str, float]
    protocol: Protocol | None
    scores: list[float]
    rates: list[float]
    achieved: list[float]
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, record: CutRecord) -> CutSummary:
        """Returns the summary of one record."""
        return cls(
            requested=record.recipe["sparsity"],
            step=record.step,
            target=record.target,
            sparsity=record.sparsity,
            perplexity=record.perplexity,
            protocol=record.protocol,
            scores=record.scores,
            rates=record.rates,
            achieved=record.achieved,
            seconds=record.seconds,
        )
