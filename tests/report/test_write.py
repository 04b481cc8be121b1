"""The files of a report, whatever becomes of the picture; folders that are exported are in tests/callbacks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from lit_prune.allocate import LayerRedundancy, Plan
from lit_prune.calibration.cached_statistics import FILE
from lit_prune.errors import InputError
from lit_prune.evaluation.tasks import HarnessSettings, TaskResults
from lit_prune.export.formats import GGUF, HuggingFace, Packed
from lit_prune.export.formats.packed import IMPORT
from lit_prune.export.plan import ExportPlan
from lit_prune.export.run_folder import RunFolder
from lit_prune.models.structure import describe
from lit_prune.pipeline import prune, score_with_statistics
from lit_prune.recipe import Recipe
from lit_prune.report.summary import summary
from lit_prune.report.write import write_report, write_results, write_scores, write_tasks
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from tests.conftest import small_model
from tests.report.reports import REPORT, SCORES, SEARCH, sparsity

IDS = torch.arange(1, 17)[None]
SHRUNK = "import lit_prune  # or pass trust_remote_code=True below"


def refuse(error: Exception) -> Any:
    def raise_it(*args: object) -> None:
        raise error

    return raise_it


def test_report_and_picture(tmp_path: Path) -> None:
    assert write_report(tmp_path, REPORT) == [tmp_path / "blocks.png", tmp_path / "report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["parameters"] == 1_000_000
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_without_scores_there_is_no_picture(tmp_path: Path) -> None:
    assert write_report(tmp_path, replace(REPORT, scores=None)) == [tmp_path / "report.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_picture_that_cannot_be_drawn_costs_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lit_prune.report.write.save_figure", refuse(OverflowError("too large\nfor an axis")))
    assert write_report(tmp_path, REPORT) == [tmp_path / "report.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert "blocks.png could not be drawn: too large" in capsys.readouterr().err.replace("\n", "")


def test_a_picture_that_the_disk_does_not_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_prune.report.write.save_figure", refuse(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="could not be written: No space left on device"):
        write_report(tmp_path, REPORT)
    assert (tmp_path / "report.json").is_file()


def test_the_plan_of_scores_says_how_it_is_used(tmp_path: Path) -> None:
    _, statistics = score_with_statistics(small_model(), [IDS])
    written = write_scores(tmp_path, replace(SCORES, search=SEARCH), statistics)
    assert [path.name for path in written] == ["plan.yaml", FILE, "blocks.png", "report.json"]
    lines = (tmp_path / "plan.yaml").read_text().splitlines()
    assert lines[0] == "# block: share to remove; mean 0.5, by DLP()"
    assert lines[1].startswith("# search: 399 evaluations")
    options = f"--pruning.allocation Plan --pruning.allocation.path {tmp_path / 'plan.yaml'} --pruning.sparsity 0.5"
    assert lines[2] == f"# use it with the same method, in place of a target, by {options} --pruning.budget linears"
    assert Plan(str(tmp_path / "plan.yaml")).rates() == {0: 0.4, 1: 0.6}


def test_the_plan_has_the_rates_of_the_linears(tmp_path: Path) -> None:
    _, statistics = score_with_statistics(small_model(), [IDS])
    linears = [{"q": 0.3, "o": 0.5}, {"q": 0.6, "o": 0.6}]
    write_scores(tmp_path, replace(SCORES, linears=linears), statistics)
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text()) == {
        0: {"rate": 0.4} | linears[0],
        1: {"rate": 0.6} | linears[1],
    }
    assert "the mean of its linears, weighted by their sizes" in (tmp_path / "plan.yaml").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["linears"] == linears


def test_a_plan_of_another_mean_says_what_to_ask_for(tmp_path: Path) -> None:
    _, statistics = score_with_statistics(small_model(), [IDS])
    write_scores(tmp_path, sparsity(SCORES, requested=0.4), statistics)
    usage = (tmp_path / "plan.yaml").read_text().splitlines()[1]
    assert usage.endswith("plan.yaml --pruning.sparsity 0.5 --pruning.budget linears")
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text()) == {0: 0.4, 1: 0.6}


def test_a_card_has_the_lines_that_open_the_folder_once(tmp_path: Path) -> None:
    recipe = Recipe(Shrink([MLPWidth(multiple=8), HeadGroups()]), 0.4, LayerRedundancy(base=0.1))
    model, folder = small_model(num_key_value_heads=4), RunFolder(str(tmp_path / "run"))
    prune(model, [IDS], recipe)
    plan = ExportPlan.of(model)
    assert len([described for described in describe(model) if described.loading]) == 2
    folder.claim()
    (tmp_path / "run" / "model").mkdir()
    for format, lines in ((HuggingFace(), [SHRUNK]), (Packed(), [IMPORT]), (GGUF(), [])):
        write_tasks(folder, plan, summary(plan, None, []), format=format, base="some/model", tokenizer=None)
        card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
        assert [line for line in card.text.splitlines() if line.startswith("import lit_prune")] == lines
        assert ("gguf" in card.data.tags) is (card.data.library_name is None) is (not lines)


def test_the_report_of_an_exported_folder_gains_its_verification(tmp_path: Path) -> None:
    plan, folder = ExportPlan.of(small_model()), RunFolder(str(tmp_path / "run"))
    plan.model.name_or_path = "some/model"
    folder.claim()
    before = summary(plan, None, [])
    written, report = write_results(
        folder, plan, before, format=HuggingFace(), base="some/model", tokenizer=None, validation=None
    )
    assert [path.name for path in written] == ["model", "report.json"]
    assert before.export is None
    assert report.export is not None
    stored = json.loads((tmp_path / "run" / "report.json").read_text())
    assert stored["export"] == report.export.to_dict()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("some/model")' in card  # there is none in the folder

    plan.model.name_or_path = str(tmp_path)  # a folder that others do not have
    tasks = TaskResults("lm-eval 0.4", HarnessSettings(), {"arc": {"acc": 0.5, "samples": None}}, 1.0)
    report = replace(report, tasks=tasks)
    write_tasks(folder, plan, report, format=HuggingFace(), base="some/model", tokenizer=None)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| arc | acc 0.5000 |" in card
    assert 'AutoTokenizer.from_pretrained("the/folder/of/its/tokenizer")' in card
    assert 'AutoModelForCausalLM.from_pretrained("this/folder")' in card
    assert json.loads((tmp_path / "run" / "report.json").read_text())["tasks"]["results"]["arc"]["acc"] == 0.5
