from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_prune.evaluation.perplexity import Measurement
from lit_prune.evaluation.speed import Speed
from lit_prune.reconstruct.losses import BlockLosses
from lit_prune.report.plain import to_plain
from lit_prune.report.records import Baseline, CutRecord, ModelSize, with_perplexity
from tests.report.reports import CUT, FOUND, PROTOCOL, SEARCH

SIZE = {"before": ModelSize(10, 40, Speed(2.0, 1.0, "CPU, 2 threads")), "after": ModelSize(8, 32, None)}
BASELINE = Baseline(0, {"masked": True}, {"before": 20.0}, {"perplexity_before": 1.0}, PROTOCOL, [0.5, 0.5], 0.5)


@pytest.mark.parametrize(
    "record",
    [
        CUT,
        replace(CUT, size=SIZE, search=SEARCH, sparsity_before=0.25),
        replace(CUT, reconstruction=[BlockLosses(0.4, 0.2, 0.5, 0.3, True)]),
        replace(CUT, protocol=None),
        BASELINE,
    ],
)
def test_a_record_comes_back_from_a_checkpoint(record: Any, tmp_path: Path) -> None:
    torch.save(to_plain(record), tmp_path / "state.ckpt")
    stored = torch.load(tmp_path / "state.ckpt", weights_only=True)
    assert type(record).from_dict(stored) == record


def test_the_plain_form_has_the_fields_in_their_order() -> None:
    plain = to_plain(replace(CUT, size=SIZE, sparsity_before=0.25))
    assert list(plain)[:4] == ["step", "perplexity", "seconds", "protocol"]
    assert plain["protocol"] == {"data": "text", "windows": 3, "seq_length": 16, "tokens": 45, "dtype": "float32"}
    speed = {"prefill": 2.0, "decode": 1.0, "device": "CPU, 2 threads"}
    assert plain["size"]["before"] == {"parameters": 10, "bytes": 40, "speed": speed}
    assert plain["size"]["after"]["speed"] is None
    assert plain["search"] == {}
    assert plain["sparsity_before"] == 0.25


def test_one_more_perplexity_leaves_the_record_as_it_was() -> None:
    record: CutRecord = with_perplexity(CUT, "quantised", Measurement(66.0, PROTOCOL, 5.0))
    assert record.perplexity == {"before": 20.0, "after": 60.0, "quantised": 66.0}
    assert list(record.seconds.items())[-1] == ("perplexity_quantised", 5.0)
    assert "quantised" not in CUT.perplexity


def test_a_search_for_a_perplexity_comes_back(tmp_path: Path) -> None:
    record = replace(CUT, found=FOUND)
    torch.save(to_plain(record), tmp_path / "state.ckpt")
    assert CutRecord.from_dict(torch.load(tmp_path / "state.ckpt", weights_only=True)) == record
    assert "found" not in to_plain(CUT)
