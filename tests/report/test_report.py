import json
import math
from dataclasses import replace

from lit_prune.evaluation.perplexity import Measurement
from lit_prune.evaluation.tasks import HarnessSettings, TaskResults
from lit_prune.export.verify import Verification
from lit_prune.report.report import TaskReport, to_json
from lit_prune.report.table import table
from lit_prune.schedule import Cut
from tests.report.reports import CUT, PROTOCOL, REPORT, SCORES, SEARCH, SHAPE, SLICED, SLICES, cut, sparsity

TASKS = TaskResults("lm-eval 0.4", HarnessSettings(limit=3), {"arc": {"acc": 0.5}}, 1.5)


def test_the_file_has_the_sections_in_their_order() -> None:
    assert list(json.loads(to_json(REPORT))) == [
        *("perplexity", "protocol", "sparsity", "recipe", "calibration", "scores", "rates", "achieved"),
        *(
            "parameters",
            "recovery",
            "distillation",
            "adapter",
            "merged",
            "adapter_parameters",
            "bytes",
            "dtype",
            "dtype_in_memory",
            "quantised",
        ),
        *("sliced", "cuts", "cuts_not_made", "baseline", "seconds", "versions"),
    ]


def test_the_sections_of_a_report_of_scores() -> None:
    stored = json.loads(to_json(replace(SCORES, search=SEARCH)))
    assert list(stored) == [
        *("sparsity", "recipe", "calibration", "scores", "rates", "search", "seconds", "versions"),
    ]
    assert stored["search"]["evaluations"] == 399
    assert stored["sparsity"] == {"requested": 0.5, "budget": "linears", "target": 0.5, "planned": 0.5}


def test_the_sections_of_a_report_of_tasks() -> None:
    stored = json.loads(to_json(TaskReport(model="some/model", dtype="float32", tasks=TASKS, versions={})))
    assert stored["tasks"]["settings"]["limit"] == 3
    assert stored["tasks"]["results"] == {"arc": {"acc": 0.5}}
    assert json.loads(to_json(replace(REPORT, tasks=TASKS)))["tasks"] == stored["tasks"]


def test_the_values_of_nested_records() -> None:
    later = replace(REPORT, cuts=[cut(4, before=20.0, after=math.inf)], cuts_not_made=[Cut(9, 0.5)], baseline={"a": 1})
    stored = json.loads(to_json(later))
    assert stored["protocol"]["tokens"] == 45
    assert stored.keys().isdisjoint({"search", "scores", "rates", "achieved"})  # those of the blocks are in the cuts
    assert stored["cuts"][0]["rates"] == [0.4, 0.6]
    assert stored["cuts"][0]["perplexity"] == {"before": 20.0, "after": None}
    assert stored["cuts_not_made"] == [{"step": 9, "sparsity": 0.5}]
    assert stored["baseline"] == {"a": 1}


def test_a_shape_stands_under_the_name_of_its_structure() -> None:
    stored = json.loads(to_json(SLICED))
    assert (stored["sliced"], stored["slice"]["requested"], stored["slice"]["achieved"]) == (True, 0.25, 0.2512)
    assert stored["slice"]["dense"]["speed"] == {"prefill": 100.0, "decode": 10.0, "device": "CPU, 2 threads"}
    again = replace(SLICED, shape=replace(SHAPE, reference="before")).to_dict()["slice"]
    assert again["before"] == stored["slice"]["dense"]
    assert "dense" not in again
    dense = json.loads(to_json(REPORT))
    assert stored.keys() - dense.keys() == {"slice"}
    assert not dense["sliced"]
    other = replace(SLICES, name="channels")
    stored = json.loads(to_json(replace(SLICED, structures=[other], shape=replace(SHAPE, structure=other))))
    assert (stored["sliced"], stored["channels"]["achieved"]) == (False, 0.2512)
    assert "slice" not in stored


def test_a_shape_that_another_cut_left_has_a_section_and_rows() -> None:
    masked = replace(REPORT, structures=[SLICES])
    assert json.loads(to_json(masked))["slice"] == SLICES.facts
    assert list(table(masked).columns[0].cells).count("widths of the blocks") == 1


def test_a_number_that_is_not_finite_is_null() -> None:
    report = replace(REPORT, perplexity={"dense": 20.0, "recovered": math.nan}, rates=[0.5, math.inf])
    stored = json.loads(to_json(report))
    assert stored["perplexity"] == {"dense": 20.0, "recovered": None}
    assert stored["rates"] == [0.5, None]


def test_one_more_perplexity() -> None:
    report = replace(REPORT, perplexity={"dense": 20.0, "recovered": None})
    added = report.with_perplexity("recovered", Measurement(30.0, PROTOCOL, 5.0))
    assert added.perplexity == {"dense": 20.0, "recovered": 30.0}
    assert added.seconds["perplexity_recovered"] == 5.0
    assert report.measured == {"dense": 20.0}
    unmeasured = replace(report, protocol=None).with_perplexity("recovered", Measurement(30.0, PROTOCOL, 5.0))
    assert unmeasured.protocol == PROTOCOL


def test_perplexities_of_another_protocol_are_left_out() -> None:
    other = replace(PROTOCOL, windows=9)
    added = REPORT.with_perplexity("recovered", Measurement(30.0, other, 5.0))
    assert added.perplexity == {"dense": None, "pruned": None, "recovered": 30.0}
    assert added.protocol == other


def test_which_models_have_masks() -> None:
    assert REPORT.masked
    assert not SLICED.masked
    assert not replace(REPORT, recipe=None).masked
    trained = replace(REPORT, baseline={"recipe": CUT.recipe})
    assert not trained.masked
    assert sparsity(trained, before=0.5).masked


def test_the_last_perplexity_is_that_of_rounded_weights() -> None:
    exported = Verification("HuggingFace", False, True, 10, 10, 0.1, 31.0)
    assert REPORT.with_exported(exported).perplexity == REPORT.perplexity
    rounded = replace(REPORT, dtype="bfloat16").with_exported(exported)
    assert rounded.perplexity == {"dense": 20.0, "pruned": 60.0, "recovered": 31.0}
    assert rounded.export is exported
    unmeasured = replace(exported, perplexity=None)
    assert replace(REPORT, dtype="bfloat16").with_exported(unmeasured).perplexity == REPORT.perplexity
