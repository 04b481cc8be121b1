"""The sections of a report: sparsity, shape, quantisation, and the cuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_prune.allocate.budget import Budget
from lit_prune.evaluation.perplexity import Protocol
from lit_prune.models.structure import Description
from lit_prune.report.plain import OMIT, json_form, to_plain
from lit_prune.report.records import CutRecord, ModelSize


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """The requested share of removed weights, and the share that is exactly zero.

    Attributes:
        requested: `sparsity` of the recipe; None if no recipe is known.
        budget: Meaning of ``requested``, see ``allocate.budget``.
        target: Mean of the rates that ``requested`` amounts to.
        achieved_linears: Share of zeros in the pruned linears.
        missed: ``achieved_linears`` minus ``target``.
        before: Share of zeros in the same linears before this run; None for a dense model.
        achieved_all: Share of zeros among all parameters.
        planned: Mean of the rates, in a report of scores alone.
    """

    requested: float | None
    budget: str | None = field(default=None, metadata=json_form(none_as=OMIT))
    target: float | None = field(default=None, metadata=json_form(none_as=OMIT))
    achieved_linears: float | None = field(default=None, metadata=json_form(none_as=OMIT))
    missed: float | None = field(default=None, metadata=json_form(none_as=OMIT))
    before: float | None = field(default=None, metadata=json_form(none_as=OMIT))
    achieved_all: float | None = field(default=None, metadata=json_form(none_as=OMIT))
    planned: float | None = field(default=None, metadata=json_form(none_as=OMIT))


@dataclass(frozen=True)
class TargetSize:
    """The size that was asked for, and the one that came out.

    Attributes:
        unit: `parameters` or `bytes`, of the exported weights.
        requested: The number asked for.
        achieved: The number that came out.
    """

    unit: str
    requested: int
    achieved: int


@dataclass(frozen=True)
class Shape:
    """The structure that a cut gave a model, and the size of the model before and after the cut.

    Attributes:
        structure: Description of the structure, see ``models.structure``.
        requested: Requested share to remove.
        before: Size before the cut; None if it is not known.
        pruned: Size after the cut; None if it is not known.
        budget: Meaning of ``requested``, see ``allocate.budget``.
        reference: Name of the model before the cut, as of its perplexity: `dense`, or `before` if it was pruned or
            trained before.
    """

    structure: Description
    requested: float
    before: ModelSize | None = None
    pruned: ModelSize | None = None
    budget: Budget = "linears"
    reference: str = "dense"

    def to_dict(self) -> dict[str, Any]:
        """Returns the section of report.json; the budget is left out if the share is the mean over the blocks."""
        sizes = {self.reference: to_plain(self.before), "pruned": to_plain(self.pruned)}
        budget = {} if self.budget == "linears" else {"budget": self.budget}
        return {"requested": self.requested, **budget, **self.structure.facts, **sizes}


@dataclass(frozen=True)
class Quantised:
    """The quantisation of the linears for the recovery, and the form of their export.

    Attributes:
        quantization: Type of the quantised weights, such as `nf4`.
        double_quant: Whether the scales are quantised as well.
        form: Form of the export: `adapter`, `merged` or `requantised`; None without an adapter.
        bytes_unquantised: Bytes of the parameters in full precision.
    """

    quantization: str
    double_quant: bool
    form: str | None
    bytes_unquantised: int


@dataclass(frozen=True)
class CutSummary:
    """One of the cuts of a run; ``requested`` is its sparsity, the other fields are those of :class:`CutRecord`."""

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
    linears: list[dict[str, float]] | None = field(default=None, metadata=json_form(none_as=OMIT))
    parts: list[dict[str, float]] | None = field(default=None, metadata=json_form(none_as=OMIT))

    @classmethod
    def of(cls, record: CutRecord) -> CutSummary:
        """Returns the summary of a cut's record."""
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
            linears=record.linears,
            parts=record.parts,
        )
