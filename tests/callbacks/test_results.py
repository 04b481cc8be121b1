"""The folder that comes out of a plain Trainer around somebody's own module."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lit_prune.callbacks import ResultsCallback, RunCheckpoint
from lit_prune.callbacks.results import base_name
from transformers import AutoModelForCausalLM

from lit_prune.allocate import Uniform
from lit_prune.errors import InputError
from lit_prune.models.on_disk import save
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import MaskedLoRA, QLoRA, Recovery
from lit_prune.slice import Slicing
from tests.callbacks.test_dynamic_pruning import QUIET, Foreign, callback, fit, loader, slicing


def test_the_folder_of_a_fit(tmp_path: Path) -> None:
    module, results = Foreign(), ResultsCallback(str(tmp_path / "run"), config="a: 1\n")
    fit(module, callback(), loader(1), callbacks=[results])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["perplexity"]["recovered"] == pytest.approx(report["export"]["perplexity"], rel=1e-4)
    assert report["seconds"]["train"] > 0
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1\n"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = next(iter(loader(1)))["input_ids"]
    torch.testing.assert_close(opened(ids).logits, module.model.eval()(ids).logits)


def test_the_folder_of_a_sliced_fit_has_the_adapter_merged(tmp_path: Path) -> None:
    module, results = Foreign(), ResultsCallback(str(tmp_path / "run"))
    fit(module, slicing(), loader(1), callbacks=[results], max_steps=8)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert abs(report["perplexity"]["recovered"] - report["export"]["perplexity"]) < 0.01
    assert report["export"]["adapter"] == "merged"
    assert sorted(path.name for path in (tmp_path / "run" / "model").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_sliced.py",
    ]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    sliced = report["slice"]
    assert opened.config.slice_sizes == [*sliced["sizes"], sliced["head_size"]]
    assert report["parameters"] == sliced["pruned"]["parameters"] == sum(p.numel() for p in opened.parameters())
    assert report["bytes"] == 4 * report["parameters"]
    assert sliced["dense"]["parameters"] == 25_312
    assert sliced["achieved"] == sliced["requested"] == 0.25
    assert sliced["untied_head"]
    assert sliced["shortcut_parameters"] == sum(p.numel() for n, p in opened.named_parameters() if "shortcut" in n)
    assert "import lit_prune" in (tmp_path / "run" / "model" / "README.md").read_text()
    ids = next(iter(loader(1)))["input_ids"]
    torch.testing.assert_close(opened(ids).logits, module.model.eval()(ids).logits)


def test_the_card_of_a_sliced_model_that_is_masked_says_how_it_opens(tmp_path: Path) -> None:
    module = Foreign()
    prune(module.model, [torch.randint(1, 64, (2, 16))], Recipe(Slicing(), 0.25, Uniform()))
    fit(module, callback(), loader(1), callbacks=[ResultsCallback(str(tmp_path / "run"))])
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "import lit_prune" in card
    assert "Sliced by an earlier cut" in card
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["sliced"]
    assert "requested" not in report["slice"]  # of which this run knows nothing


def test_an_existing_folder_is_refused_before_the_cut(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    module, pruning = Foreign(), callback()
    with pytest.raises(InputError, match="`output` must be a new folder"):
        Trainer(**QUIET, max_steps=1, callbacks=[ResultsCallback(str(tmp_path)), pruning]).fit(module, loader())
    assert pruning.run.done == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_it_needs_the_other_callback(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must have a DynamicPruningCallback beside the ResultsCallback"):
        Trainer(**QUIET, max_steps=1, callbacks=[ResultsCallback(str(tmp_path / "run"))]).fit(Foreign(), loader())
    assert list(tmp_path.iterdir()) == []


class Broken(Foreign):
    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        raise RuntimeError("out of luck")


def fit_over(run: Path, *callbacks: Callback) -> None:
    """A fit that fails, over the folder of an earlier one."""
    run.mkdir()
    (run / "mine").write_text("x")
    (run / "report.json").write_text("{}")
    results = ResultsCallback(str(run), overwrite=True)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(Broken(), callback(), callbacks=[results, *callbacks], enable_checkpointing=bool(callbacks))


def test_a_run_that_fails_puts_the_earlier_one_back(tmp_path: Path) -> None:
    fit_over(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["mine", "report.json"]


def test_a_run_that_fails_with_nothing_to_go_on_from_does_not_block_the_next(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(Broken(), callback(), callbacks=[ResultsCallback(str(run), config="a: 1\n", csv_log=True)], logger=False)
    assert list(tmp_path.iterdir()) == []
    fit(Foreign(), callback(), callbacks=[ResultsCallback(str(run))], max_steps=1)
    assert (run / "model").is_dir()


def test_a_run_that_fails_with_a_checkpoint_says_where_the_earlier_one_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_over(tmp_path / "run", RunCheckpoint(str(tmp_path / "run" / "checkpoints")))
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    kept = next(tmp_path.glob(".run.replaced-*")) / "run"
    assert (kept / "mine").read_text() == "x"
    assert str(kept) in capsys.readouterr().err.replace("\n", "")


def test_an_export_that_is_not_what_was_measured_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(model: torch.nn.Module, folder: Path) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        save(model, folder)  # type: ignore[arg-type]

    monkeypatch.setattr("lit_prune.export.formats.folder.save", scaled)
    with pytest.raises(RuntimeError, match=r"the exported model's perplexity is .*, in memory it is .*; not kept"):
        fit(Foreign(), callback(), loader(1), callbacks=[ResultsCallback(str(tmp_path / "run"))])
    assert list(tmp_path.iterdir()) == []


def test_a_card_names_what_was_begun_with(tmp_path: Path) -> None:
    (tmp_path / "cut" / "model").mkdir(parents=True)
    assert base_name(str(tmp_path / "cut" / "model")) == "cut/model"
    assert base_name("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    assert base_name("embedded") == "embedded"


def test_the_card_of_a_foreign_module_names_the_model_that_it_loaded(tmp_path: Path) -> None:
    module = Foreign()
    module.model.name_or_path = "org/base"
    fit(module, callback(), loader(1), callbacks=[ResultsCallback(str(tmp_path / "run"))])
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "Made from `org/base`." in card
    assert 'AutoTokenizer.from_pretrained("org/base")' in card


def test_seconds_of_training_before_and_after_a_resume_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, results = iter([100.0, 103.0, 104.0]), ResultsCallback("run")
    monkeypatch.setattr("lit_prune.callbacks.results.time.perf_counter", lambda: next(clock))
    results.load_state_dict({"seconds": 7.0})
    assert results.state_dict() == {"seconds": 7.0}
    results.on_train_start(None, None)  # type: ignore[arg-type]
    assert results.state_dict() == {"seconds": 10.0}
    results.on_train_end(None, None)  # type: ignore[arg-type]
    assert results.state_dict() == {"seconds": 11.0}  # a checkpoint at the end counts no second twice


class Diverging(Callback):
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if ".lora_" in name:
                parameter.data.fill_(torch.nan)


@pytest.mark.parametrize("recovery", [MaskedLoRA(), QLoRA(form="merged", quantization="int8")])
def test_a_training_that_diverged_is_told_so_before_anything_is_written(recovery: Recovery, tmp_path: Path) -> None:
    results = ResultsCallback(str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"`model.lr` must be lower: the training diverged, .*lora_A.* is not finite"):
        fit(Foreign(), callback(recovery=recovery), loader(1), callbacks=[Diverging(), results], max_steps=1)
    assert list(tmp_path.iterdir()) == []
