"""The record of a run goes through a file that holds plain types alone."""

import io
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.checkpointing.record import RunRecord, TeacherRecord
from lit_prune.checkpointing.weights import DroppedWeight
from lit_prune.recover import LoRA, Snapshot


def through_a_file(record: RunRecord) -> RunRecord:
    checkpoint: dict[str, Any] = {"state_dict": {}}
    record.write_to(checkpoint)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return RunRecord.read_from(torch.load(buffer, weights_only=True))


def test_everything_comes_back(model: PreTrainedModel) -> None:
    LoRA(r=2).attach(model)
    bits = torch.tensor([3, 5], dtype=torch.uint8)
    record = RunRecord(
        settings={"pruning.sparsity": 0.5, "model.betas": [0.9, 0.95], "data.seed": None},
        snapshot=Snapshot.of(model),
        dropped_weights={"a": DroppedWeight("12ab"), "b": DroppedWeight("34cd", bits)},
        gradient_masks={"c": bits},
        teacher=TeacherRecord(None, {"d": bits}),
        optimizer_step=7,
    )
    again = through_a_file(record)
    assert (again.settings, again.snapshot, again.optimizer_step) == (record.settings, record.snapshot, 7)
    assert again.dropped_weights is not None
    assert again.teacher is not None
    assert again.teacher.weights is not None
    assert [weight.digest for weight in again.dropped_weights.values()] == ["12ab", "34cd"]
    assert again.dropped_weights["a"].mask is None
    for tensor in (again.dropped_weights["b"].mask, again.gradient_masks["c"], again.teacher.weights["d"]):
        assert tensor is not None
        assert torch.equal(tensor, bits)


@pytest.mark.parametrize("record", [RunRecord(), RunRecord(settings={}, teacher=TeacherRecord("12ab", None))])
def test_what_is_not_there_stays_away(record: RunRecord) -> None:
    assert through_a_file(record) == record


def test_a_checkpoint_of_somebody_elses_has_an_empty_record() -> None:
    assert RunRecord.read_from({"state_dict": {}}) == RunRecord()
