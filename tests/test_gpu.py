"""The checks of `make gpu`, with the CPU in the place of the GPU."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tables
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.case import Case, Settings, WrongResultError, run_case
from benchmarks.gpu.masks import Difference, compare_masks
from benchmarks.resumable import Results
from lit_prune.models.load import load_tokenizer, new_model
from tests.conftest import SMALL, WIDE

CPU = torch.device("cpu")
QUICK = (
    "Wanda, weights on disk, blocks on the device",
    "Slicing, weights on the CPU, blocks on the device",
    "QLoRA, int8",
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("gpu")
    new_model({"model_type": "llama", **SMALL, **WIDE, "vocab_size": 4096, "num_hidden_layers": 2}).save_pretrained(
        folder
    )
    load_tokenizer("embedded").save_pretrained(folder)
    for name, noun in (("train", "items"), ("val", "lines")):
        (folder / f"{name}.txt").write_text("".join(f"Return the {n}th number of {noun} in it.\n" for n in range(90)))
    files = {"train_files": str(folder / "train.txt"), "val_files": str(folder / "val.txt")}
    sizes = {"num_samples": 8, "seq_length": 16, "val_windows": 8, "steps": 4}
    return Settings(str(folder), **files, **sizes, compiler="eager")  # type: ignore[arg-type]


def checked(settings: Settings, folder: Path, chosen: list[Case]) -> list[dict[str, Any]]:
    results = Results(str(folder / "results.jsonl"))
    once = partial(command.check, settings=settings, device=CPU, results=results, run=run_case)
    return [results.once(case.name, partial(once, case)) for case in chosen]


@pytest.mark.filterwarnings("ignore")
def test_cases_are_right_on_the_cpu(settings: Settings, tmp_path: Path) -> None:
    rows = checked(settings, tmp_path, [case for case in command.cases() if case.name in QUICK])
    assert [row.get("error") for row in rows] == [None] * len(QUICK)
    assert rows[0]["note"] == "0 of 73728 weights are in only one mask"
    for row in rows:
        assert row["perplexity"] == pytest.approx(row["expected"], rel=1e-6)
        assert row["tokens_per_second"] > 0
        assert row["peak_bytes"] > 1e8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1800)
def test_all_cases_are_right_on_the_cpu(settings: Settings, tmp_path: Path) -> None:
    rows = checked(settings, tmp_path, command.cases())
    assert len({row["case"] for row in rows}) == len(rows) > 40
    assert {row["case"]: row["error"] for row in rows if "error" in row} == {}


class Wrong(Case):
    """A case that gives what it is told."""

    def __init__(self, name: str, gives: Any) -> None:
        self._name, self.gives, self.runs = name, gives, 0

    @property
    def name(self) -> str:
        return self._name

    def run(self, settings: Settings, device: torch.device) -> dict[str, Any]:
        self.runs += 1
        if isinstance(self.gives, Exception):
            raise self.gives
        return {"perplexity": self.gives, "expected": 10.0}


def test_a_failing_case_stops_no_other_and_is_run_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [Wrong("right", 10.005), Wrong("off", 10.02), Wrong("fails", WrongResultError("zeros are gone"))]
    monkeypatch.setattr(command, "cases", lambda _only: cases)
    monkeypatch.setattr(command, "alone", run_case)
    monkeypatch.setattr(command.check, "__defaults__", (run_case,))
    arguments = ["--device=cpu", f"--results={tmp_path / 'rows.jsonl'}"]
    assert command.main(arguments) == 1
    told = capsys.readouterr()
    assert "FAILED off: perplexity is +0.20% of the CPU's, allowed are 0.10%" in told.err
    assert "FAILED fails: zeros are gone" in told.err
    assert "1 of 3 cases are right" in told.err
    assert "| cpu | right | right |" in told.out
    cases[1].gives, cases[2].gives = 9.995, 10.0
    assert command.main(arguments) == 0
    assert [case.runs for case in cases] == [1, 2, 2]
    assert command.main([*arguments, "--steps=7"]) == 2
    assert "has results of other settings" in capsys.readouterr().err


def test_a_case_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Pool:
        def __init__(self, workers: int, mp_context: Any) -> None:
            asked.append((workers, mp_context.get_start_method()))

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: Any) -> None: ...

        def submit(self, function: Any, *given: Any) -> Any:
            return type("Future", (), {"result": lambda _: function(*given)})()

    monkeypatch.setattr(command, "ProcessPoolExecutor", Pool)
    assert command.alone(Wrong("right", 10.0), Settings(), CPU)["perplexity"] == 10.0
    assert asked == [(1, "spawn")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "`device` must be one that this machine has, got cuda" in capsys.readouterr().err


def test_masks_may_differ_in_ties() -> None:
    score = torch.tensor([[1.0, 2.0, 2.0001, 3.0], [1.0, 2.0, 5.0, 6.0]])
    one = torch.tensor([[False, False, True, True], [False, False, True, True]])
    other = torch.tensor([[False, True, False, True], [False, False, True, True]])
    assert compare_masks(one, other, score, by_row=True) == Difference(8, 2, 2)
    assert compare_masks(one, other, score, by_row=False) == Difference(8, 2, 2)
    wrong = torch.tensor([[False, False, True, True], [True, False, False, True]])
    assert compare_masks(one, wrong, score, by_row=True) == Difference(8, 2, 0)
    # the first row loses one more in one mask, the second in the other: scores 2 and 2.0001 are compared
    score = torch.tensor([[1.0, 2.0, 7.0], [1.0, 2.0001, 6.0]])
    first, second = torch.tensor([[0, 0, 1], [0, 1, 1]]) > 0, torch.tensor([[0, 1, 1], [0, 0, 1]]) > 0
    assert compare_masks(first, second, score, by_row=True) == Difference(6, 2, 2)
    score[1, 1] = 3.0
    assert compare_masks(first, second, score, by_row=True) == Difference(6, 2, 0)
    assert compare_masks(first, first, score, by_row=True) == Difference(6, 0, 0)


def test_the_table_has_every_device_and_says_when_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MEASURED", tmp_path)
    page = "<!-- table: gpu -->\n<!-- end -->"
    assert "Not measured yet" in tables.render(page)
    row = {"device": "GPU 1", "case": "Wanda", "tokens_per_second": 12345.6, "peak_bytes": 2.5e9, "perplexity": 18.8}
    (tmp_path / "gpu-gpu-1.jsonl").write_text(
        json.dumps({"case": "a reference, on the CPU"}) + "\n" + json.dumps(row) + "\n"
    )
    (tmp_path / "gpu-gpu-2.jsonl").write_text(json.dumps({"device": "GPU 2", "case": "Wanda", "error": "no"}) + "\n")
    lines = tables.render(page).splitlines()
    assert lines[3] == "| GPU 1 | Wanda | right | 12,346 | 2,500 | 18.800 |  |"
    assert lines[4] == "| GPU 2 | Wanda | no |  |  |  |  |"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100-SXM4-40GB")
    assert command.results_file(torch.device("cuda")) == tmp_path / "gpu-nvidia-a100-sxm4-40gb.jsonl"
