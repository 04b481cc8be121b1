"""Packed folders through a run, with every recovery, and what the format refuses."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.cli.main import main
from lit_prune.errors import InputError
from lit_prune.export.formats import HuggingFace, Packed
from lit_prune.export.plan import ExportPlan, Outline
from lit_prune.export.verify import verify
from lit_prune.models.files.mappable import headers
from lit_prune.packed.unpack import unpack_folder
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, Recovery
from tests.conftest import FAMILIES, small_model

IDS = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(1))
TEXT = [{"input_ids": IDS}]


def trained(recovery: Recovery | None, family: str = "llama") -> PreTrainedModel:
    model = small_model(family)
    prune(model, [IDS], Recipe(Magnitude(), 0.5))
    if recovery is not None:
        recovery.attach(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01 * torch.randn(parameter.shape) * (parameter.data != 0)
    return model


@pytest.mark.parametrize("recovery", [None, FullFineTuning(), MaskedLoRA(), LoRA()], ids=str)
def test_a_folder_is_verified_and_unpacked_as_the_ordinary_one(recovery: Recovery | None, tmp_path: Path) -> None:
    plan = ExportPlan.of(trained(recovery))
    Packed().write(plan, tmp_path / "packed")
    HuggingFace().write(plan, tmp_path / "ordinary")
    assert verify(tmp_path / "packed", plan, Packed(), (TEXT, "text")).max_logit_difference == 0
    assert (tmp_path / "packed" / "adapter_model.safetensors").exists() == (recovery == LoRA())
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    for file in (tmp_path / "ordinary").iterdir():
        assert (tmp_path / "unpacked" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_are_those_of_the_stored_tensors(family: str, tmp_path: Path) -> None:
    plan = ExportPlan.of(trained(None, family))
    Packed().write(plan, tmp_path)
    stored = [torch.Size(header.shape).numel() * header.dtype.itemsize for header in headers(str(tmp_path)).values()]
    assert Packed().bytes(plan) == sum(stored)
    assert Packed().bytes(plan) < 0.8 * plan.bytes


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        ({"masked": True, "quantised": True}, "for weights in 4 or 8 bits, which are packed already, got Packed: or"),
        ({"masked": False}, "for a model without pruned weights, got Packed: there are no zeros to leave out"),
        ({"masked": True, "on_disk": True}, "with `model.on_disk`, got Packed: packed weights are opened in memory"),
    ],
)
def test_what_cannot_be_packed(outline: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"`format` must be HuggingFace {message}"):
        Packed().check(Outline("full precision", "llama", **outline))
    Packed().check(Outline("adapter", "llama", masked=True))


def test_the_card_says_how_it_is_opened_with_and_without_lit_prune() -> None:
    usage = Packed().usage(Outline("merged", "llama", masked=True), "this/folder")
    assert "\nimport lit_prune  # opens packed weights\nfrom transformers import" in f"\n{usage.split('```python')[1]}"
    assert "`python unpack.py this/folder OUTPUT` writes the ordinary folder" in usage


def test_a_run_of_the_command_and_unpack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")  # Lightning's advice
    Path("train.txt").write_text("Return the number of items in a container, or raise an error.\n" * 100)
    Path("val.txt").write_text("Open the file, read its lines and close it again when that is done.\n" * 100)
    data = ["--data.train_files=train.txt", "--data.val_files=val.txt", "--data.seq_length=64", "--data.val_windows=2"]
    recipe = ["--pruning.method=Magnitude", "--pruning.sparsity=0.6", "--pruning.allocation=Uniform"]
    calibration = ["--pruning.calibration.num_samples=2", "--pruning.calibration.seq_length=64"]
    main(["prune", *data, *recipe, *calibration, "--format=packed", "--output=run"])
    report = json.loads(Path("run/report.json").read_text())
    assert report["export"]["format"] == "Packed"
    assert report["bytes_unpacked"] == 2 * report["parameters"]
    assert report["bytes"] < 0.6 * report["bytes_unpacked"]
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())  # the table folds its lines
    assert "MB in bfloat16, packed; 8.1 MB with the zeros" in printed
    assert "packed; 8.1 MB with the zeros" in Path("run/model/README.md").read_text()
    main(["unpack", "run/model", "--output", "out"])
    assert capsys.readouterr().out == "out\n"
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())
    assert not Path("out/unpack.py").exists()
    assert headers("out")["model.layers.0.mlp.up_proj.weight"].shape == (512, 192)
