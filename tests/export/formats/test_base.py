"""A format that lit_prune does not know is one class: a run writes, reopens, compares and counts it."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import pytest
import torch
from lightning.pytorch import Trainer
from lit_prune.callbacks import ResultsCallback
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.cli.main import main
from lit_prune.errors import InputError
from lit_prune.export.formats import ExportFormat, Tolerance
from lit_prune.export.plan import ExportPlan, Outline
from lit_prune.recover import LoRA
from tests.callbacks.test_dynamic_pruning import QUIET, Foreign, callback, fit, loader

SPARSE = "tests.export.formats.test_base.Sparse"


@final
@dataclass(frozen=True)
class Sparse(ExportFormat):
    """Where the weights are not zero, and their values there."""

    scale: float = 1
    tolerance: ClassVar[Tolerance] = Tolerance(weights=0.01, logits=0.05, perplexity=0.05)

    def check(self, outline: Outline) -> None:
        if outline.form != "full precision" or outline.reshaped:
            raise InputError(f"`format` Sparse must have plain weights, got {outline.form}.")

    def write(self, plan: ExportPlan, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        folder.mkdir()
        weights = {name: (w != 0, w[w != 0] * self.scale) for name, w in plan.plain.state_dict().items()}
        torch.save(weights, folder / "weights.pt")
        plan.plain.config.save_pretrained(folder)

    def open(
        self,
        folder: Path,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        on_disk: bool = False,
        trust_remote_code: bool = False,
    ) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype).eval()
        state = {}
        for name, (keep, values) in torch.load(folder / "weights.pt").items():
            state[name] = torch.zeros(keep.shape, dtype=values.dtype).masked_scatter(keep, values)
        model.load_state_dict(state)
        return model.to(device)

    def bytes(self, plan: ExportPlan) -> int:
        sizes = [w.numel() // 8 + int((w != 0).sum()) * w.itemsize for w in plan.plain.parameters()]
        return sum(sizes)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("Return the number of items in a container, or raise an error.\n" * 200)
    Path("val.txt").write_text("Open the file, read its lines and close it again when that is done.\n" * 100)
    warnings.simplefilter("ignore")  # Lightning's advice


def run(verb: str, *args: str) -> None:
    data = ["--data.train_files=train.txt", "--data.val_files=val.txt", "--data.seq_length=64", "--data.val_windows=2"]
    calibration = ["--pruning.calibration.num_samples=2", "--pruning.calibration.seq_length=64"]
    main([verb, "--model.dtype=float32", "--output=run", *data, *calibration, *args])


def test_a_format_of_ones_own_goes_through_a_run() -> None:
    run("prune", "--pruning.method=Magnitude", "--pruning.allocation=Uniform", f"--format={SPARSE}")
    assert sorted(path.name for path in Path("run/model").iterdir()) == ["README.md", "config.json", "weights.pt"]
    report = json.loads(Path("run/report.json").read_text())
    export = report["export"]
    assert export["format"] == "Sparse"
    assert export["zeros_expected"] == export["zeros_found"] > 0
    assert export["max_logit_difference"] == 0
    assert export["perplexity"] == pytest.approx(report["perplexity"]["pruned"])
    kept = 1 - report["sparsity"]["achieved_all"]
    assert report["bytes"] == pytest.approx((1 / 8 + 2 * kept) * report["parameters"], rel=1e-4)
    assert SPARSE in Path("run/config.yaml").read_text()


def test_a_format_that_reads_other_weights_than_it_wrote_is_not_kept() -> None:
    with pytest.raises(RuntimeError, match=r"the exported model's .* is not what was written; not kept"):
        run("prune", "--pruning.method=Magnitude", f"--format={SPARSE}", "--format.scale=1.05")
    assert not Path("run/model").exists()


def test_a_lossy_format_is_kept_within_its_tolerance() -> None:
    run("prune", "--pruning.method=Magnitude", f"--format={SPARSE}", "--format.scale=1.005")
    export = json.loads(Path("run/report.json").read_text())["export"]
    assert export["max_logit_difference"] > 0
    assert export["zeros_expected"] == export["zeros_found"]


def test_the_card_says_how_a_foreign_format_is_opened() -> None:
    usage = Sparse(scale=2).usage(Outline("full precision", "llama"), "this/folder", ["import more"])
    assert "import more\nfrom tests.export.formats.test_base import Sparse\n" in usage
    assert 'model = Sparse(scale=2).open(Path("this/folder"), torch.device("cpu"))' in usage


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        (["prune", "--pruning.method=Slicing"], "full precision"),
        (["fit", "--trainer.max_steps=1"], "merged"),
        (["fit", "--trainer.max_steps=1", "--pruning.recovery=LoRA"], "adapter"),
        (["fit", "--trainer.max_steps=1", "--pruning.recovery=QLoRA"], "adapter"),
    ],
)
def test_the_command_refuses_a_model_that_the_format_cannot_hold_before_any_work(
    arguments: list[str], form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_prune.fit.module.load_model", lambda *args: pytest.fail("the weights were loaded"))
    with pytest.raises(SystemExit):
        run(*arguments, f"--format={SPARSE}")
    assert f"`format` Sparse must have plain weights, got {form}." in capsys.readouterr().err
    assert not Path("run").exists()


def test_an_unknown_format_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("prune", "--format=HugingFace")
    assert "`format` must be one of GGUF, HuggingFace, Packed, or the dotted path" in capsys.readouterr().err


def test_a_model_that_the_format_cannot_hold_is_refused_before_it_is_cut(tmp_path: Path) -> None:
    results, module = ResultsCallback(str(tmp_path / "run"), format=Sparse()), Foreign()
    trainer = Trainer(**QUIET, max_steps=1, enable_checkpointing=False, callbacks=[results, callback(recovery=LoRA())])
    with pytest.raises(InputError, match="`format` Sparse must have plain weights, got adapter"):
        trainer.fit(module, loader(1))
    assert all(parameter.all() for name, parameter in module.named_parameters() if "proj" in name)
    assert not (tmp_path / "run").exists()


def test_a_cut_before_the_format_was_asked_is_refused_before_the_training(tmp_path: Path) -> None:
    results, module = ResultsCallback(str(tmp_path / "run"), format=Sparse()), Foreign()
    with pytest.raises(InputError, match="`format` Sparse must have plain weights, got adapter"):
        fit(module, callback(recovery=LoRA()), loader(1), callbacks=[results], max_steps=1)
    assert not any(tensor.any() for name, tensor in module.state_dict().items() if ".lora_B" in name)
    assert not (tmp_path / "run").exists()
