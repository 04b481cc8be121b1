"""CONTRIBUTING.md: the list of folders, and the example of a method with its test, the contract and the command."""

import importlib
import json
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lit_prune.calibration.statistics import InputStatistics
from lit_prune.cli.main import main
from tests.pruning.test_mask_method import test_contract as contract
from tests.test_architecture import rooms

TEXT = Path(__file__).parent.parent.joinpath("CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
FOLDERS = re.findall(r"^\| (`.*?`) \| ", TEXT.split("## The tree")[1].split("| to change |")[0], re.M)


def test_the_list_has_every_folder_below_those_that_it_imports() -> None:
    row = {name: number for number, cell in enumerate(FOLDERS) for name in re.findall(r"(\w+)(?:/|\.py)`", cell)}
    imported = rooms()
    assert imported.keys() <= row.keys()
    assert [(name, other) for name, used in imported.items() for other in used if row[other] > row[name]] == []


@pytest.fixture
def ria(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example's file as a module of its own, outside of the package."""
    (tmp_path / "my_ria.py").write_text(BLOCKS[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_ria", raising=False)
    return importlib.import_module("my_ria")


def test_its_own_test_passes(ria: ModuleType) -> None:
    space: dict[str, Any] = {"RIA": ria.RIA, "InputStatistics": InputStatistics, "torch": torch}
    exec(BLOCKS[1], space)
    space["test_ria_by_hand"]()


@pytest.mark.parametrize("rate", [0.0, 0.37, 0.99])
def test_it_keeps_the_contract(ria: ModuleType, rate: float) -> None:
    contract(ria.RIA, torch.float32, rate)


def test_the_command_takes_it_by_its_path(ria: ModuleType) -> None:
    warnings.simplefilter("ignore")
    Path("train.txt").write_text("Return the number of items in a container, or raise an error.\n" * 100)
    Path("val.txt").write_text("Open the file, read its lines and close it again when that is done.\n" * 100)
    method = ["--pruning.method=my_ria.RIA", "--pruning.method.power=0.7", "--pruning.calibration.num_samples=4"]
    data = ["--data.train_files=train.txt", "--data.val_files=val.txt", "--data.seq_length=64", "--data.val_windows=4"]
    main(["prune", *method, *data, "--pruning.calibration.seq_length=64", "--output=run"])
    report = json.loads(Path("run/report.json").read_text())
    assert report["recipe"]["method"] == "RIA(pattern=Unstructured(), propagate='dense', power=0.7)"
    assert report["sparsity"]["achieved_linears"] == pytest.approx(0.5, abs=1e-3)
