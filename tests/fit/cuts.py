"""A cut as a Trainer's hook makes it."""

from transformers import PreTrainedModel

from lit_prune.fit.cut import CutInputs, MeasuredCut, measured_cut
from lit_prune.pipeline import prune
from lit_prune.report.records import CutRecord


def prune_inside(model: PreTrainedModel, cut: MeasuredCut) -> None:
    """Prunes within the body of a measured cut."""
    given = cut.inputs
    cut.pruned = prune(model, given.batches, given.recipe, device=given.device, statistics=given.statistics)


def cut(model: PreTrainedModel, inputs: CutInputs) -> CutRecord:
    """Returns the record of a cut."""
    with measured_cut(model, inputs) as made:
        prune_inside(model, made)
    return made.record
