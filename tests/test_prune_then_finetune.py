"""A folder that was pruned, trained further without another cut: its zeros and widths last, record or not."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.cli.main import main
from lit_prune.fit.module import PrunableLM
from lit_prune.masks.zeros import pruned_blocks, zero_shares
from lit_prune.models.load import load_tokenizer
from lit_prune.recover.merge import without_adapter
from tests.conftest import small_model

SMALL = [
    "--model.pretrained=dense/model",
    "--model.dtype=float32",
    "--model.lr=1e-3",
    "--data.seq_length=32",
    "--data.batch_size=2",
    "--data.val_windows=4",
    "--data.train_files=train.txt",
    "--data.val_files=val.txt",
    "--pruning.calibration.num_samples=2",
    "--pruning.calibration.seq_length=32",
    "--trainer.max_steps=2",
    "--trainer.enable_progress_bar=false",
]
Zeros = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, a folder pruned by masks, the same without a record, and a sliced one."""
    warnings.simplefilter("ignore")
    where = tmp_path_factory.mktemp("folders")
    small_model(vocab_size=4096, num_hidden_layers=2).save_pretrained(where / "dense" / "model")
    load_tokenizer("embedded").save_pretrained(where / "dense" / "model")
    (where / "train.txt").write_text("Return the number of items in a container, or raise an error.\n" * 80)
    (where / "val.txt").write_text("Open the file, read its lines and close it again when that is done.\n" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        main(["prune", *SMALL, "--output=masked"])
        sliced = ["--pruning.method=Slicing", "--pruning.allocation=LayerRedundancy", "--pruning.sparsity=0.25"]
        main(["prune", *SMALL, "--output=sliced", *sliced])
    shutil.copytree(where / "masked" / "model", where / "foreign" / "model")
    config = json.loads((where / "foreign/model/config.json").read_text())
    del config["lit_prune"]
    (where / "foreign/model/config.json").write_text(json.dumps(config))
    return where


@pytest.fixture
def train(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Trains one of the folders, cutting nothing; returns the report."""
    warnings.simplefilter("ignore")
    monkeypatch.chdir(folder)

    def run(name: str, *args: str, verb: str = "fit", output: str = "x") -> dict:
        whole = [f"--model.pretrained={name}/model", "--pruning.method=null", f"--output={tmp_path / output}"]
        main([verb, *SMALL, *whole, *args])
        return json.loads((tmp_path / output / "report.json").read_text())

    return run


def zeros_of(model: PreTrainedModel) -> Zeros:
    blocks = pruned_blocks(without_adapter(model))
    return {f"{b.path}.{name}": linear.weight_OI == 0 for b in blocks for name, linear in b.linears.items()}


def changed(before: PreTrainedModel, after: PreTrainedModel) -> float:
    ids = torch.arange(1, 33)[None]
    return float((before(ids).logits - after(ids).logits).abs().max())


@pytest.mark.parametrize("recovery", ["LoRA", "MaskedLoRA", "FullFineTuning", "QLoRA"])
@pytest.mark.parametrize("name", ["masked", "foreign"])
def test_masks_last(name: str, recovery: str, folder: Path, tmp_path: Path, train: Callable[..., dict]) -> None:
    answer = ["--pruning.keep_zeros=true"] if name == "foreign" else []
    answer += ["--pruning.recovery.quantization=int8"] if recovery == "QLoRA" else []
    told = train(name, f"--pruning.recovery={recovery}", *answer)
    first = AutoModelForCausalLM.from_pretrained(folder / name / "model", dtype=torch.float32)
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "x" / "model")
    assert changed(first, last) > 1e-3
    before, after = zeros_of(first), zeros_of(last)
    assert all((after[linear] | ~gone).all() for linear, gone in before.items())
    assert sum(int(gone.sum()) for gone in before.values()) == told["export"]["zeros_expected"]
    assert told["sparsity"]["before"] == pytest.approx(0.5, abs=1e-3)
    assert told["perplexity"]["before"] != told["perplexity"]["after"]
    assert told["perplexity"]["after"] == pytest.approx(told["export"]["perplexity"], rel=1e-3)
    assert last.config.lit_prune["masked"]
    assert (told["recipe"] is None) is (name == "foreign")
    card = (tmp_path / "x/model/README.md").read_text()
    assert (
        "before it was trained here"
        if name == "masked"
        else "The base model was already pruned, and training kept its zeros: 50.00%"
    ) in card


@pytest.mark.parametrize("recovery", ["LoRA", "MaskedLoRA", "FullFineTuning"])
def test_widths_last(recovery: str, folder: Path, tmp_path: Path, train: Callable[..., dict]) -> None:
    told = train("sliced", f"--pruning.recovery={recovery}")
    first, last = (
        AutoModelForCausalLM.from_pretrained(where / "model") for where in (folder / "sliced", tmp_path / "x")
    )
    assert last.config.slice_sizes == first.config.slice_sizes
    assert told["slice"]["sizes"] == first.config.slice_sizes[:-1]
    assert changed(first, last) > 1e-3
    assert told["export"]["adapter"] in (None, "merged")


def test_an_adapter_that_lies_in_the_folder_is_trained_on(tmp_path: Path, train: Callable[..., dict]) -> None:
    first = train("masked", "--pruning.recovery=LoRA")
    other = [
        "--pruning.recovery=LoRA",
        "--output",
        str(tmp_path / "y"),
        "--model.pretrained",
        str(tmp_path / "x/model"),
    ]
    train("masked", *other)
    second = json.loads((tmp_path / "y/report.json").read_text())
    assert second["perplexity"]["before"] == pytest.approx(first["perplexity"]["after"])
    assert second["adapter_parameters"] == first["adapter_parameters"]
    assert second["export"]["zeros_found"] == first["export"]["zeros_found"]
    base, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in "xy")
    for (name, left), right in zip(base.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right) is (".lora_" not in name), name


def test_a_run_that_cuts_nothing_resumes_to_the_same_weights(
    tmp_path: Path, train: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: PrunableLM, *args: object) -> None:
        if self.global_step == 2:
            raise KeyboardInterrupt

    whole = ["--pruning.recovery=MaskedLoRA", "--trainer.max_steps=4"]
    train("foreign", *whole)
    with monkeypatch.context() as patch:
        patch.setattr(PrunableLM, "on_train_batch_end", stop)
        with pytest.raises(SystemExit):
            train("foreign", *whole, output="y")
    told = train("foreign", *whole, "--ckpt_path=last", output="y")
    main(["export", f"--ckpt_path={tmp_path / 'y/checkpoints/last.ckpt'}", f"--output={tmp_path / 'z'}"])
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in "xyz"]
    assert changed(models[0], models[1]) == changed(models[0], models[2]) == 0
    assert told["sparsity"]["before"] == pytest.approx(0.5, abs=1e-3)
    assert json.loads((tmp_path / "z/report.json").read_text())["perplexity"] == told["perplexity"]


REFUSED = [
    (
        "foreign",
        ["--pruning.recovery=LoRA"],
        "`pruning.keep_zeros` must be given: 50.0% of the weights of the linears are zero",
    ),
    ("foreign", ["--pruning.recovery=null"], "`pruning.keep_zeros` must be given: 50.0%"),
    ("foreign", ["--pruning.method=Wanda", "--pruning.at_step=1"], "`pruning.keep_zeros` must be given: 50.0%"),
    (
        "foreign",
        ["--pruning.recovery=MaskedLoRA", "--pruning.keep_zeros=false"],
        "`pruning.keep_zeros` must not be false with MaskedLoRA",
    ),
    (
        "foreign",
        ["--pruning.method=Wanda", "--pruning.keep_zeros=false"],
        "`pruning.keep_zeros` must not be false with Wanda",
    ),
    ("foreign", ["--pruning.keep_zeros=true", "--pruning.recovery=null"], "`pruning.recovery` must be given"),
    ("masked", ["--pruning.recovery=null"], "`pruning.recovery` must be given for a model with masks"),
    (
        "foreign",
        ["--pruning.keep_zeros=true", "--pruning.method=Wanda", "--pruning.at_step=1", "--pruning.recovery=MaskedLoRA"],
        "`pruning.before` must be given for a model with masks, or training fills their zeros: use MaskedLoRA or",
    ),
    ("masked", ["--pruning.keep_zeros=false"], "`pruning.keep_zeros` must not be false for a model whose record"),
    ("masked", ["--pruning.before=LoRA"], "`pruning.before` must be null without `pruning.method`"),
    ("sliced", ["--model.architecture={'model_type': 'llama'}"], "`pruning.recovery` must be null if `model.arch"),
]


@pytest.mark.parametrize(("name", "args", "told"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_would_fill_zeros_is_refused_in_a_line(
    name: str,
    args: list[str],
    told: str,
    train: Callable[..., dict],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        train(name, *args)
    message = capsys.readouterr().err
    assert re.search(f"^lit-prune: error: {re.escape(told)}", message, re.MULTILINE), message
    assert "Traceback" not in message
    assert not (tmp_path / "x").exists()


def test_zeros_that_may_be_filled_are(tmp_path: Path, train: Callable[..., dict]) -> None:
    told = train("foreign", "--pruning.recovery=LoRA", "--pruning.keep_zeros=false")
    assert told["sparsity"]["achieved_all"] < 0.01
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "x/model")
    assert zero_shares(opened)[1] < 0.01
    assert "No pruning of it is recorded." in (tmp_path / "x/model/README.md").read_text()


def test_a_cut_that_nothing_is_trained_before_fills_no_zeros(train: Callable[..., dict]) -> None:
    told = train("foreign", "--pruning.method=Wanda", "--pruning.sparsity=0.6", "--pruning.at_step=1", verb="prune")
    assert told["sparsity"]["achieved_linears"] == pytest.approx(0.6, abs=1e-3)


def test_zeros_that_were_filled_are_found_at_export(
    train: Callable[..., dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lit_prune.recover.full.freeze_zeros", lambda model: None)
    with pytest.raises(RuntimeError, match=r"has \d+ zeros in the pruned linears, the one in memory 7680"):
        train("masked", "--pruning.recovery=FullFineTuning")
    assert not (tmp_path / "x/model").exists()
