"""The reports of the verbs, as report.json has them: of a run that makes a model, of scores alone, of tasks alone.

A report that gains facts while the run goes on is another one, made by ``dataclasses.replace``.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lit_prune.evaluation.perplexity import Measurement, Protocol
from lit_prune.evaluation.tasks import TaskResults
from lit_prune.export.verify import Verification
from lit_prune.models.structure import Description
from lit_prune.report.plain import OMIT, fields_to_plain, json_form, to_plain
from lit_prune.report.records import SearchRecord
from lit_prune.report.sections import CutSummary, Quantised, Shape, Sparsity
from lit_prune.schedule import Cut

PACKAGES = ("lit-prune", "torch", "lightning", "transformers", "peft", "bitsandbytes", "torchmetrics", "datasets")


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of a run that leaves a model.

    Attributes:
        perplexity: By name: `dense` (`before` for a model that was pruned already), `pruned` after the last cut,
            `quantised`, `recovered`, `requantised`; `before` and `after` of a training that cut nothing. None where it
            was not measured.
        protocol: What they were measured on.
        sparsity: Asked for and reached.
        recipe: See ``recipe.recipe_record``; None where nothing is known to have been cut.
        calibration: The settings of the calibration text.
        scores: Of the last cut, one a block.
        rates: The share that each block was to give.
        achieved: The share that each block has given.
        search: How the search of the rates went.
        parameters: Of the model without an adapter.
        recovery: What was trained after the cut.
        distillation: How the dense model taught it.
        adapter: peft's settings of the adapter; None without one.
        merged: Whether the adapter is merged into the weights that are exported.
        adapter_parameters: How many it has.
        bytes: What the exported weights take.
        quantised: How the model was quantised; None in full precision.
        shape: The structure that the cut gave the model; None where it changed no shape.
        structures: All structures of the model, those of earlier runs included.
        cuts: Every cut of the run.
        cuts_not_made: Those that the training ended before.
        baseline: What had been done to a model that was trained without a cut; None where this run cuts.
        seconds: How long each part took, by name.
        versions: See :func:`versions`.
        export: What the reopened folder gave.
        tasks: The results of lm-eval.
    """

    perplexity: Mapping[str, float | None]
    protocol: Protocol | None
    sparsity: Sparsity
    recipe: Mapping[str, Any] | None
    calibration: Mapping[str, Any] | None
    scores: list[float] | None
    rates: list[float] | None
    achieved: list[float] | None
    search: SearchRecord | None = field(default=None, metadata=json_form(none_as={}))
    parameters: int
    recovery: str | None
    distillation: str | None
    adapter: Mapping[str, Any] | None
    merged: bool
    adapter_parameters: int
    bytes: int
    quantised: Quantised | None
    shape: Shape | None = field(metadata=json_form(key="slice"))
    structures: Sequence[Description] = field(default=(), metadata=json_form(key="sliced"))
    cuts: Sequence[CutSummary] = ()
    cuts_not_made: Sequence[Cut] = ()
    baseline: Mapping[str, Any] | None = field(default=None, metadata=json_form(key="kept"))
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    export: Verification | None = field(default=None, metadata=json_form(none_as=OMIT))
    tasks: TaskResults | None = field(default=None, metadata=json_form(none_as=OMIT))

    def to_dict(self) -> dict[str, Any]:
        """Returns what report.json has, the shape under the name of its structure."""
        plain = {**fields_to_plain(self), "slice": None}
        plain["sliced"] = any(structure.name == "slice" for structure in self.structures)
        return plain if self.shape is None else {**plain, self.shape.structure.name: self.shape.to_dict()}

    @property
    def measured(self) -> dict[str, float]:
        """The perplexities that were measured, in the order of the run."""
        return {name: value for name, value in self.perplexity.items() if value is not None}

    @property
    def masked(self) -> bool:
        """Whether weights of the model are masked."""
        return self.shape is None and (bool(self.sparsity.before) or (self.pruned_here and bool(self.recipe)))

    @property
    def pruned_here(self) -> bool:
        """Whether this run was to cut, and not only to train what had been cut before."""
        return self.baseline is None

    def with_perplexity(self, name: str, measured: Measurement) -> Report:
        """Returns the report with one more perplexity, those of another protocol left out."""
        comparable = self.protocol in (None, measured.protocol)
        return replace(
            self,
            perplexity={
                **(self.perplexity if comparable else dict.fromkeys(self.perplexity)),
                name: measured.perplexity,
            },
            protocol=measured.protocol,
            seconds={**self.seconds, f"perplexity_{name}": measured.seconds},
        )


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """The report of scores and rates, of which nothing was cut; see Report."""

    sparsity: Sparsity
    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any]
    scores: list[float]
    rates: list[float]
    search: SearchRecord | None = field(default=None, metadata=json_form(none_as={}))
    seconds: Mapping[str, float]
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """The report of lm-eval's tasks, of a model that is left as it is.

    Attributes:
        model: Its id or folder.
        dtype: Its type.
        tasks: The results.
        versions: See :func:`versions`.
    """

    model: str | None
    dtype: str
    tasks: TaskResults
    versions: Mapping[str, str]


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def to_json(report: Report | ScoreReport | TaskReport) -> str:
    """Returns the text of report.json, where a number that is not finite, which JSON does not have, is null."""
    return json.dumps(_finite(to_plain(report)), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
