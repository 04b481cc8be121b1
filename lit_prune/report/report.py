"""The reports of the verbs, which report.json stores: of a run that writes a model, of `score` and of `evaluate`.

Reports are frozen: facts that come later in a run are added by ``dataclasses.replace``.
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
from lit_prune.reconstruct.losses import BlockLosses
from lit_prune.report.plain import OMIT, fields_to_plain, json_form, to_plain
from lit_prune.report.records import SearchRecord
from lit_prune.report.sections import CutSummary, Quantised, Shape, Sparsity, TargetSize
from lit_prune.schedule import Cut
from lit_prune.target_perplexity import FoundSparsity

PACKAGES = ("lit-prune", "torch", "lightning", "transformers", "peft", "bitsandbytes", "torchmetrics", "datasets")


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of a run that writes a model.

    Attributes:
        perplexity: Perplexities by name: `dense` (`before` for a model that was already pruned or trained), `pruned`
            after the last cut, `quantised`, `recovered`, `requantised`; for a training without cuts `before` and
            `after`, for an export alone `exported`. None for one that was not measured.
        protocol: Text and windows of the perplexities; None if none was measured.
        sparsity: Requested and achieved sparsity.
        recipe: The recipe, see ``recipe.recipe_record``; None for a model that no recorded run has cut.
        calibration: Settings of the calibration text.
        scores: Score of each block at the last cut.
        rates: Planned rate of each block.
        linears: Planned rates of each block's linears by name; None if they all have the block's rate.
        parts: Planned rates of each block's parts by name, for `Shrink`; None if only the blocks have rates.
        achieved: Achieved rate of each block.
        search: Record of the search for rates; None if there was none.
        reconstruction: Losses of every block before and after its reconstruction at the last cut; empty without one.
        parameters: Number of parameters of the exported weights, without an adapter beside them.
        untied_parameters: Number of parameters of a head that was tied to the embedding and no longer is, because an
            adapter on it was merged; None for any other.
        recovery: The recovery after the cut, as its repr; None if there was none.
        distillation: The distillation from the dense model, as its repr; None if there was none.
        adapter: The adapter's settings as peft stores them; None if there is no adapter.
        merged: Whether the adapter is merged into the exported weights.
        adapter_parameters: Number of parameters of the adapter.
        bytes: Bytes of the exported weights.
        bytes_unpacked: Bytes of the same weights with their zeros; None if these are stored.
        dtype: Data type of the exported weights.
        dtype_in_memory: Data type that the model was trained and measured in.
        quantised: Quantisation of the model; None in full precision.
        shape: The structure that the cut gave the model; None if it changed no shape.
        structures: All structures of the model, those of earlier runs included.
        target: The size that was asked for and the one that came out; None if a share was asked for.
        target_perplexity: The search for the sparsity of a perplexity; None if another target was given.
        cuts: Every cut of the run.
        cuts_not_made: Planned cuts that the training ended before.
        baseline: Record of the model before a training without cuts, see ``models.structure``; None if this run cuts.
        seconds: Duration of each part, by name.
        versions: See :func:`versions`.
        export: Result of verifying the exported folder.
        tasks: Results of lm-eval.
    """

    perplexity: Mapping[str, float | None]
    protocol: Protocol | None
    sparsity: Sparsity
    recipe: Mapping[str, Any] | None
    calibration: Mapping[str, Any] | None
    scores: list[float] | None = field(metadata=json_form(none_as=OMIT))
    rates: list[float] | None = field(metadata=json_form(none_as=OMIT))
    linears: list[dict[str, float]] | None = field(default=None, metadata=json_form(none_as=OMIT))
    parts: list[dict[str, float]] | None = field(default=None, metadata=json_form(none_as=OMIT))
    achieved: list[float] | None = field(metadata=json_form(none_as=OMIT))
    search: SearchRecord | None = field(default=None, metadata=json_form(none_as=OMIT))
    reconstruction: Sequence[BlockLosses] = ()
    parameters: int
    untied_parameters: int | None = field(default=None, metadata=json_form(none_as=OMIT))
    recovery: str | None
    distillation: str | None
    adapter: Mapping[str, Any] | None
    merged: bool
    adapter_parameters: int
    bytes: int
    bytes_unpacked: int | None = field(default=None, metadata=json_form(none_as=OMIT))
    dtype: str
    dtype_in_memory: str
    quantised: Quantised | None
    shape: Shape | None = field(metadata=json_form(key="slice", none_as=OMIT))
    structures: Sequence[Description] = field(default=(), metadata=json_form(key="sliced"))
    target: TargetSize | None = field(default=None, metadata=json_form(none_as=OMIT))
    target_perplexity: FoundSparsity | None = field(default=None, metadata=json_form(none_as=OMIT))
    cuts: Sequence[CutSummary] = ()
    cuts_not_made: Sequence[Cut] = ()
    baseline: Mapping[str, Any] | None = None
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    export: Verification | None = field(default=None, metadata=json_form(none_as=OMIT))
    tasks: TaskResults | None = field(default=None, metadata=json_form(none_as=OMIT))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form.

        The shape is stored under the name of its structure, and the numbers of every block in its cut alone.
        """
        plain = fields_to_plain(self)
        plain["sliced"] = any(structure.name == "slice" for structure in self.structures)
        names = {"slice": self.shape.structure.name} if self.shape is not None else {}
        left_out = {"scores", "rates", "achieved"} if self.cuts else set()
        left_out |= set() if self.reconstruction else {"reconstruction"}
        renamed = {names.get(name, name): value for name, value in plain.items() if name not in left_out}
        others = {structure.name: structure.facts for structure in self.other_structures}
        return renamed | {name: facts for name, facts in others.items() if name not in renamed}

    @property
    def measured(self) -> dict[str, float]:
        """The perplexities that were measured, in the order of the run."""
        return {name: value for name, value in self.perplexity.items() if value is not None}

    @property
    def other_structures(self) -> Sequence[Description]:
        """The structures of the model besides those of ``shape``: of earlier runs, or of cuts by other methods."""
        cut = None if self.shape is None else self.shape.structure
        shown = set() if cut is None else {cut.name, *cut.facts.get("parts", {})}
        return [structure for structure in self.structures if structure.name not in shown]

    @property
    def masked(self) -> bool:
        """Whether the model has masked weights."""
        if self.shape is not None:
            return bool(self.sparsity.achieved_linears)
        return bool(self.sparsity.before) or (self.pruned_here and bool(self.recipe))

    @property
    def pruned_here(self) -> bool:
        """Whether this run cuts the model, instead of only training it."""
        return self.baseline is None

    @property
    def rounded(self) -> bool:
        """Whether the weights are exported in another data type than that of the model in memory."""
        return self.dtype != self.dtype_in_memory

    def with_exported(self, verification: Verification) -> Report:
        """Returns the report with the verification of the exported folder.

        The last perplexity becomes that of the folder, if its weights were rounded to another data type.
        """
        report = replace(self, export=verification)
        if not self.rounded or verification.perplexity is None:
            return report
        last = list(self.measured)[-1]
        return replace(report, perplexity={**self.perplexity, last: verification.perplexity})

    def with_perplexity(self, name: str, measured: Measurement) -> Report:
        """Returns the report with one more perplexity; those of another protocol become None."""
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
    """The report of `lit-prune score`, which cuts nothing; its fields are those of :class:`Report`."""

    sparsity: Sparsity
    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any]
    scores: list[float]
    rates: list[float]
    linears: list[dict[str, float]] | None = field(default=None, metadata=json_form(none_as=OMIT))
    parts: list[dict[str, float]] | None = field(default=None, metadata=json_form(none_as=OMIT))
    search: SearchRecord | None = field(default=None, metadata=json_form(none_as=OMIT))
    seconds: Mapping[str, float]
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """The report of `lit-prune evaluate`.

    Attributes:
        model: Id or folder of the model; None if it has neither.
        dtype: Data type of its weights.
        tasks: Results of lm-eval.
        versions: See :func:`versions`.
    """

    model: str | None
    dtype: str
    tasks: TaskResults
    versions: Mapping[str, str]


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the reported numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def to_json(report: Report | ScoreReport | TaskReport) -> str:
    """Returns the text of report.json; numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(_finite(to_plain(report)), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
