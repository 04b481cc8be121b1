"""Reports to render."""

import math
from dataclasses import replace
from typing import Any

from lit_prune.evaluation.perplexity import Protocol
from lit_prune.evaluation.speed import Speed
from lit_prune.models.structure import Description
from lit_prune.reconstruct.losses import BlockLosses
from lit_prune.report.records import CutRecord, ModelSize, SearchRecord
from lit_prune.report.report import Report, ScoreReport, versions
from lit_prune.report.sections import CutSummary, Shape, Sparsity
from lit_prune.target_perplexity import FoundSparsity, SparsityTrial

PROTOCOL = Protocol(data="text", windows=3, seq_length=16, tokens=45, dtype="float32")
SEARCH = SearchRecord(evaluations=399, sweeps=33, windows=2, loss_start=4.25, loss_end=3.75)
TRIALS = (SparsityTrial(0.5, 60.0), SparsityTrial(0.25, 24.0), SparsityTrial(0.375, math.inf))
FOUND = FoundSparsity(sparsity=0.25, perplexity=24.0, limit=30.0, before=20.0, trials=TRIALS)
LOSSES = [BlockLosses(0.4, 0.2, 0.5, 0.3, True), BlockLosses(0.6, 0.6, 0.7, 0.9, False)]
RECIPE = {"method": "Wanda()", "allocation": "DLP()", "sparsity": 0.5}
CUT = CutRecord(
    step=4,
    perplexity={"before": 20.0, "after": 60.0},
    seconds={"perplexity_before": 1.0, "score": 2.0, "prune": 3.0, "perplexity_after": 4.0},
    protocol=PROTOCOL,
    calibration={"num_samples": 8},
    size={},
    recipe=RECIPE,
    scores=[1.0, 2.0],
    rates=[0.4, 0.6],
    target=0.5,
    achieved=[0.41, 0.59],
    sparsity=0.5,
)
REPORT = Report(
    perplexity={"dense": 20.0, "pruned": 60.0, "recovered": 30.0},
    protocol=PROTOCOL,
    sparsity=Sparsity(
        requested=0.5, budget="linears", target=0.5, achieved_linears=0.4999, missed=-0.0001, achieved_all=0.39
    ),
    recipe=RECIPE,
    calibration={"num_samples": 8},
    scores=[1.0, 2.0],
    rates=[0.4, 0.6],
    achieved=[0.4, 0.6],
    parameters=1_000_000,
    recovery=None,
    distillation=None,
    adapter={"r": 8},
    merged=False,
    adapter_parameters=8000,
    bytes=4_000_000,
    dtype="float32",
    dtype_in_memory="float32",
    quantised=None,
    shape=None,
    seconds={"score": 1.0, "train": 2.0},
    versions=versions(),
)
SCORES = ScoreReport(
    sparsity=Sparsity(requested=0.5, budget="linears", target=0.5, planned=0.5),
    recipe=RECIPE,
    calibration={"num_samples": 8},
    scores=[1.0, 2.0],
    rates=[0.4, 0.6],
    seconds={"score": 1.0},
    versions=versions(),
)
SLICES = Description(
    name="slice",
    facts={"achieved": 0.2512, "sizes": [56, 40]},
    done="Sliced",
    outcome="the residual stream has 40 to 56 of its 64 dimensions, 25.12% less in the mean.",
    rows={
        "dimensions of the residual stream removed, mean over blocks": "0.2512",
        "widths of the blocks": "40 to 56 of 64",
    },
    unit="dimensions of the residual stream",
    noun="width",
    sizes=(56, 40),
    full=64,
    achieved=0.2512,
    loading="import lit_prune  # or pass trust_remote_code=True below",
)
SHAPE = Shape(
    structure=SLICES,
    requested=0.25,
    before=ModelSize(1_000_000, 3_000_000, Speed(100.0, 10.0, "CPU, 2 threads")),
    pruned=ModelSize(1_100_000, 4_000_000, Speed(150.0, 9.0, "CPU, 2 threads")),
)
SLICED = replace(
    REPORT,
    sparsity=Sparsity(requested=None, achieved_linears=0.0, achieved_all=0.0),
    merged=True,
    structures=[SLICES],
    parameters=1_100_000,
    shape=SHAPE,
)


def cut(step: int, sparsity: float = 0.5, **perplexity: float) -> CutSummary:
    return CutSummary.of(replace(CUT, step=step, sparsity=sparsity, perplexity=perplexity))


def perplexity(report: Report = REPORT, **values: float) -> Report:
    return replace(report, perplexity=values)


def sparsity(report: Any, **fields: Any) -> Any:
    return replace(report, sparsity=replace(report.sparsity, **fields))
