"""The command, from its arguments to what it leaves in the folder."""

import json
import logging
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune.cli.main import main
from lit_prune.evaluation.perplexity import measure
from lit_prune.fit.module import PrunableLM
from lit_prune.masks.zeros import zeros
from lit_prune.models.load import EMBEDDED, load_model, new_model
from lit_prune.prune import SparseGPT

SMALL = [
    "--model.dtype=float32",
    "--data.seq_length=64",
    "--data.batch_size=4",
    "--data.val_windows=8",
    "--pruning.calibration.num_samples=4",
    "--pruning.calibration.seq_length=64",
]
STEPS = [
    "--trainer.max_steps=2",
    "--trainer.log_every_n_steps=5",
    "--trainer.enable_progress_bar=false",
    "--model.lr=1e-3",
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs in a folder of its own, with text of its own; Lightning's advice is no error here."""
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("Return the number of items in a container, or raise an error.\n" * 200)
    Path("val.txt").write_text("Open the file, read its lines and close it again when that is done.\n" * 100)
    Path("empty.yaml").write_text("")
    Path("prunning.yaml").write_text("prunning:\n  sparsity: 0.5\n")
    warnings.simplefilter("ignore")
    return tmp_path


def files() -> list[str]:
    return ["--data.train_files=train.txt", "--data.val_files=val.txt"]


def run(verb: str, *args: str) -> None:
    main([verb, *SMALL, *files(), *(STEPS if verb == "fit" else []), *args])


def report(folder: str = "runs/x") -> dict:
    return json.loads(Path(folder, "report.json").read_text())


def test_fit_prunes_recovers_and_leaves_a_hugging_face_folder(capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--output=runs/x", "--trainer.max_steps=30", "--pruning.sparsity=0.7")
    told = report()
    perplexity = told["perplexity"]
    assert perplexity["dense"] < perplexity["pruned"]
    assert perplexity["recovered"] < perplexity["pruned"]
    assert told["protocol"]["windows"] == 8
    assert told["sparsity"]["requested"] == 0.7
    assert told["sparsity"]["achieved_linears"] == pytest.approx(0.7, abs=1e-3)
    assert 0.3 < told["sparsity"]["achieved_all"] < 0.7
    assert len(told["scores"]) == len(told["rates"]) == 8
    assert max(told["rates"]) - min(told["rates"]) == pytest.approx(0.3, abs=1e-6)
    assert {"score", "prune", "train"} <= told["seconds"].keys()
    assert told["parameters"] > 1e6
    assert told["bytes"] > told["parameters"]
    assert told["versions"]["torch"] == torch.__version__
    assert told["export"]["perplexity"] == pytest.approx(perplexity["recovered"], rel=1e-3)

    opened = AutoModelForCausalLM.from_pretrained("runs/x/model")
    tokenizer = AutoTokenizer.from_pretrained("runs/x/model")
    ids = tokenizer(Path("val.txt").read_text(), return_tensors="pt")["input_ids"][:, : 8 * 64].view(8, 64)
    assert measure(opened, [{"input_ids": ids}], "val").perplexity == pytest.approx(perplexity["recovered"], rel=1e-3)
    linears = [w for name, w in opened.named_parameters() if "_proj" in name and ".lora_" not in name]
    zero, total = zeros(linears)
    assert zero / total == pytest.approx(0.7, abs=1e-3)

    assert sorted(path.name for path in Path("runs/x").iterdir()) == [
        "blocks.png",
        "checkpoints",
        "config.yaml",
        "logs",
        "model",
        "report.json",
    ]
    config = yaml.safe_load(Path("runs/x/config.yaml").read_text())
    assert config["pruning"]["sparsity"] == 0.7
    assert not config["overwrite"]
    assert "train/loss" in next(Path("runs/x/logs").rglob("metrics.csv")).read_text()
    printed = capsys.readouterr().out
    for line in (
        "perplexity, dense",
        "perplexity, recovered",
        "runs/x/model",
        "runs/x/report.json",
        "runs/x/blocks.png",
    ):
        assert line in printed


def test_the_written_configuration_gives_the_same_run_again() -> None:
    run("fit", "--output=runs/x")
    main(["fit", "--config=runs/x/config.yaml", "--output=runs/y"])
    main(["score", "--config=runs/x/config.yaml", "--output=runs/z"])
    first, second = report(), report("runs/y")
    assert first["perplexity"] == pytest.approx(second["perplexity"])
    assert first["rates"] == second["rates"]


def test_prune_trains_nothing() -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    run("prune", "--output=runs/x", "--pruning.allocation=Uniform", *logger)
    assert "perplexity/pruned" in next(Path("logs").rglob("metrics.csv")).read_text()  # once it is finalised
    told = report()
    assert told["perplexity"]["recovered"] is None
    assert told["perplexity"]["pruned"] > told["perplexity"]["dense"]
    assert not Path("runs/x/model/adapter_config.json").exists()
    assert told["rates"] == pytest.approx([0.5] * 8)
    assert "train" not in told["seconds"]


def test_score_writes_a_plan_that_prune_and_fit_accept(capsys: pytest.CaptureFixture[str]) -> None:
    run("score", "--output=runs/score", "--pruning.allocation.alpha=0.2")
    assert "block" in capsys.readouterr().out
    assert not Path("runs/score/model").exists()
    planned = yaml.safe_load(Path("runs/score/plan.yaml").read_text())
    assert sum(planned.values()) / 8 == pytest.approx(0.5, abs=1e-5)
    assert max(planned.values()) - min(planned.values()) == pytest.approx(0.4, abs=1e-5)
    Path("plan.yaml").write_text("".join(f"{block}: {0.3 if block % 2 else 0.7}\n" for block in range(8)))
    plan = ["--pruning.allocation=Plan", "--pruning.allocation.path=plan.yaml"]
    run("prune", "--output=runs/x", *plan)
    assert report()["rates"] == pytest.approx([0.7, 0.3] * 4)
    run("fit", "--output=runs/y", *plan)
    assert report("runs/y")["achieved"] == pytest.approx([0.7, 0.3] * 4, abs=1e-3)


def test_score_once_sweep_many(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("score", "--output=runs/look")
    told = json.loads(Path("runs/look/report.json").read_text())["calibration"]
    assert (told["text"], told["tokenizer"]) == ("train.txt", "embedded")
    stored = "--pruning.statistics=runs/look"
    run("prune", "--output=runs/plain", "--pruning.allocation=OWL", "--pruning.sparsity=0.6")
    other = ["--pruning.calibration.num_samples=3", "--data.train_files=val.txt", "--data.val_files=train.txt"]
    with monkeypatch.context() as patch:
        patch.setattr("lit_prune.fit.module.load_model", lambda *_: pytest.fail("weights were read"))
        with pytest.raises(SystemExit):
            run("prune", "--output=runs/other", stored, *other)
    assert re.search(
        r"`pruning.statistics` must be of this model and this calibration text, runs/look/statistics.safetensors is of "
        r"others: other calibration tokens; `calibration.num_samples` 4, now 3; `calibration.text` train.txt, now val",
        capsys.readouterr().err,
    )
    assert not Path("runs/other").exists()
    monkeypatch.setattr("lit_prune.pipeline.Stream", lambda *_: pytest.fail("the model ran"))
    run("prune", "--output=runs/swept", "--pruning.allocation=OWL", "--pruning.sparsity=0.6", stored)
    assert report("runs/swept")["rates"] == report("runs/plain")["rates"]
    assert report("runs/swept")["perplexity"] == report("runs/plain")["perplexity"]
    run("score", "--output=runs/again", "--pruning.allocation=LayerRedundancy", stored)
    run("fit", "--output=runs/fit", "--pruning.allocation=LayerRedundancy", "--pruning.statistics=runs/again")
    assert report("runs/fit")["rates"] == pytest.approx(report("runs/again")["rates"])


def test_score_searches_and_its_plan_says_how_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    search = ["--pruning.allocation=Search", "--pruning.allocation.start=OWL", "--pruning.allocation.start.lam=0.1"]
    search += ["--pruning.allocation.evaluations=40", "--pruning.allocation.state=state.json", "--pruning.sparsity=0.6"]
    score = ["score", f"--config={quickstart}", *SMALL, *files(), *search]
    main([*score, "--output=runs/look"])
    told = json.loads(Path("runs/look/report.json").read_text())
    assert told["recipe"]["allocation"].startswith("Search(start=OWL(threshold=5.0, lam=0.1), evaluations=40")
    assert 16 <= told["search"]["evaluations"] <= 40
    assert told["search"]["loss_end"] < told["search"]["loss_start"]
    plan = Path("runs/look/plan.yaml").read_text()
    line = f"{told['search']['evaluations']} evaluations of a calibration window in"
    assert f"# search: {line}" in plan
    assert line in " ".join(capsys.readouterr().out.split())
    assert len(json.loads(Path("state.json").read_text())["losses"]) == told["search"]["evaluations"]
    main([*score, "--output=runs/again"])  # all is in the state
    assert json.loads(Path("runs/again/report.json").read_text())["rates"] == told["rates"]
    run("prune", "--output=runs/x", *search)
    assert report()["rates"] == told["rates"]
    assert report()["search"] == told["search"]
    assert "search of the rates" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("prune", "--output=runs/y", *search, "--pruning.allocation.start.lam=0.2")
    assert re.search(r"`Search.state` must be of the same search, .*lam=0.1\), now OWL", capsys.readouterr().err)
    assert not Path("runs/y").exists()


def test_n_of_m() -> None:
    pattern = ["--pruning.method.pattern=NofM", "--pruning.method.pattern.n=2", "--pruning.method.pattern.m=4"]
    run("fit", "--output=runs/x", "--pruning.allocation=Uniform", *pattern)
    told = report()
    assert told["recipe"]["method"] == "Wanda(pattern=NofM(n=2, m=4), propagate='dense')"
    assert told["achieved"] == [0.5] * 8
    opened = AutoModelForCausalLM.from_pretrained("runs/x/model")
    linears = [w for name, w in opened.named_parameters() if "_proj" in name and ".lora_" not in name]
    assert all(((w != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all() for w in linears)
    main(["prune", "--config=runs/x/config.yaml", "--output=runs/y"])  # the saved configuration has the pattern
    assert report("runs/y")["recipe"] == told["recipe"]


def test_mixed_n_of_m_says_by_how_much_it_misses(capsys: pytest.CaptureFixture[str]) -> None:
    mixed = ["--pruning.method.pattern=MixedNofM", "--pruning.sparsity=0.45"]
    run("score", "--output=runs/score", *mixed)
    assert "missed by +0.0031" in " ".join(capsys.readouterr().out.split())  # 29 of 64 eighths
    run("prune", "--output=runs/x", *mixed)
    assert report()["sparsity"]["missed"] == pytest.approx(29 / 64 - 0.45)
    assert "0.4531  (missed by +0.0031)" in capsys.readouterr().out
    assert all(rate * 8 == round(rate * 8) for rate in report()["rates"])
    plan = re.search(r"--pruning.allocation Plan.*", Path("runs/score/plan.yaml").read_text())
    run("prune", "--output=runs/y", *mixed, *plan[0].split())
    assert report("runs/y")["rates"] == report()["rates"]


def test_a_share_of_all_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    all_of_it = ["--pruning.budget=parameters", "--pruning.sparsity=0.4"]
    run("prune", "--output=runs/x", *all_of_it)
    told = report()["sparsity"]
    assert (told["requested"], told["budget"]) == (0.4, "parameters")
    assert told["achieved_all"] == pytest.approx(0.4, abs=1e-3)
    assert told["achieved_linears"] == pytest.approx(told["target"], abs=1e-3)
    assert told["target"] > 0.45
    assert "sparsity requested, share of all parameters" in capsys.readouterr().out
    assert "at a sparsity of 0.4 (share of all parameters)" in Path("runs/x/model/README.md").read_text()
    run("score", "--output=runs/score", *all_of_it)
    plan = ["--pruning.allocation=Plan", "--pruning.allocation.path=runs/score/plan.yaml"]
    run("prune", "--output=runs/y", *plan, *all_of_it)
    of_linears = re.search(r"--pruning.sparsity \S+ --pruning.budget linears", Path(plan[1][26:]).read_text())
    run("prune", "--output=runs/z", *plan, *of_linears[0].split())
    assert report("runs/y")["rates"] == pytest.approx(report()["rates"], abs=1e-5)
    assert report("runs/z")["rates"] == pytest.approx(report()["rates"], abs=1e-5)


def test_method_and_recovery_null_are_plain_training(capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--output=runs/x", "--pruning.method=null", "--pruning.recovery=null")
    told = report()
    assert told["sparsity"]["requested"] is None
    assert told["recipe"] is None
    assert list(told["perplexity"]) == ["after"]
    assert zeros(AutoModelForCausalLM.from_pretrained("runs/x/model").parameters())[0] < 100


def test_validate_and_test_write_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run("validate")
    run("test", "--data.test_files=val.txt")
    told = capsys.readouterr()
    printed = told.out
    assert "val.txt; 8 windows of 64 tokens" in told.err
    for logger in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        told_by = logging.getLogger(logger)
        record = told_by.makeRecord(logger, logging.INFO, "", 0, "Seed set to 0, TPU available: False", (), None)
        assert not told_by.filter(record)
    assert "val/perplexity" in printed
    assert "test/perplexity" in printed
    assert not Path("runs").exists()
    assert not Path("lightning_logs").exists()


def test_an_interrupted_run_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: PrunableLM, *args: object) -> None:
        if self.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PrunableLM, "on_train_batch_end", stop)
        with pytest.raises(SystemExit):
            run("fit", "--output=runs/x", "--trainer.max_steps=6")
    assert not Path("runs/x/model").exists()
    run("fit", "--output=runs/x", "--ckpt_path=last", "--trainer.max_steps=6")
    assert torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert report()["perplexity"]["recovered"] < report()["perplexity"]["pruned"]


OTHER_RUNS = [
    (["--pruning.sparsity=0.8"], "`pruning.sparsity` must be what the checkpoint was made with, 0.5, got 0.8"),
    (["--pruning.recovery.r=4"], "`pruning.recovery` must be what the checkpoint was made with, LoRA(r=8"),
    (["--pruning.at_step=1"], "`pruning.at_step` must be what the checkpoint was made with, 0, got 1"),
    (["--pruning.method=null"], "`pruning.method` must be what the checkpoint was made with, Wanda("),
    (["--data.seed=1"], "`data.seed` must be what the checkpoint was made with, 0, got 1"),
    (["--data.batch_size=2"], "`data.batch_size` must be what the checkpoint was made with, 4, got 2"),
    (["--data.seq_length=32"], "`data.seq_length` must be what the checkpoint was made with, 64, got 32"),
    (["--data.train_files=other.txt"], "`data.train_files (or data.source)` must be what the checkpoint was made"),
    (["--model.lr=1"], "`model.lr` must be what the checkpoint was made with, 0.001, got 1.0"),
    (["--model.pretrained=other"], "`model.pretrained` must be the model that the checkpoint was made from, its"),
    (["--ckpt_path=dense.ckpt"], "whole checkpoint of a fit with a DynamicPruningCallback, dense.ckpt is none"),
    (["--ckpt_path=train.txt"], "train.txt cannot be read as one"),
    (["--output=runs/y"], "`output` must be a new folder"),
    (
        ["--pruning.sparsity=0.30000000000000004", "--data.seed=1", "--model.lr=1"],
        "made with, 0.5, got 0.3; so must `model.lr`, 0.001, got 1.0; so must `data.seed`, 0, got 1; change them back",
    ),
]


def test_a_checkpoint_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--output=runs/x")
    run("prune", "--output=runs/y")
    torch.save({"lit_prune": {"record": {}, "adapter": None}}, "dense.ckpt")
    Path("other.txt").write_text(Path("train.txt").read_text() * 2)
    other = load_model("embedded")
    other.model.norm.weight.data[0] += 1
    other.save_pretrained("other")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained("other")
    written = Path("runs/x/report.json").read_text()
    for args, message in OTHER_RUNS:
        with pytest.raises(SystemExit):
            run("fit", "--output=runs/z", "--ckpt_path=runs/x/checkpoints/last.ckpt", *args)
        assert message in capsys.readouterr().err
        assert Path("runs/x/report.json").read_text() == written
        assert not Path("runs/z").exists()


@pytest.mark.parametrize(("recovery", "lr"), [("MaskedLoRA", 1e-3), ("FullFineTuning", 1e-4)])
def test_a_recovery_that_keeps_the_zeros_heals_and_resumes_and_exports(recovery: str, lr: float) -> None:
    healed = [f"--pruning.recovery={recovery}", "--pruning.sparsity=0.7", f"--model.lr={lr}"]
    run("fit", "--output=runs/x", *healed, "--trainer.max_steps=15")
    first = report()
    run("fit", "--output=runs/x", *healed, "--trainer.max_steps=30", "--ckpt_path=last")
    told = report()
    perplexity, exported = told["perplexity"], told["export"]
    assert perplexity["recovered"] < first["perplexity"]["recovered"] < perplexity["pruned"]
    assert told["recovery"].startswith(recovery)
    assert not Path("runs/x/model/adapter_config.json").exists()
    assert exported["verified"]
    assert exported["merged"] is (recovery == "MaskedLoRA")
    assert abs(exported["perplexity"] - perplexity["recovered"]) <= 0.01
    assert exported["zeros_found"] >= exported["zeros_expected"] > 2e6
    assert exported["zeros_found"] == exported["zeros_expected"] or recovery == "FullFineTuning"
    opened = AutoModelForCausalLM.from_pretrained("runs/x/model")
    zero, total = zeros(w for name, w in opened.named_parameters() if "_proj" in name)
    assert zero / total == pytest.approx(0.7, abs=1e-4)

    main(["export", "--ckpt_path=runs/x/checkpoints/last.ckpt", "--merge", "--output=runs/y"])
    again = report("runs/y")
    assert again["export"] == pytest.approx(exported)
    assert again["perplexity"] == pytest.approx(perplexity)
    assert again["seconds"]["train"] > 0
    stored = [Path(run, "model/model.safetensors").read_bytes() for run in ("runs/x", "runs/y")]
    assert stored[0] == stored[1]


def test_export_of_lora_over_masks_leaves_the_adapter_beside_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--output=runs/x")
    first = report()
    with pytest.raises(SystemExit):
        main(["export", "--ckpt_path", "last", "--output", "runs/x", "--merge", "--overwrite"])
    assert "`merge` must be left out for LoRA over masks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "--ckpt_path", "last", "--output", "runs/x"])
    assert "`output` has a model already, runs/x/model: choose another" in capsys.readouterr().err
    Path("runs/x/model").rename("kept")
    Path("runs/x/report.json").unlink()
    main(["export", "--ckpt_path", "last", "--output", "runs/x"])  # what fit would have left
    assert Path("runs/x/model/adapter_model.safetensors").is_file()
    assert report()["perplexity"] == pytest.approx(first["perplexity"])
    assert report()["export"]["adapter"] == "unmerged, at the root of model/"
    Path("runs/x").rename("runs/lit_prune")
    main(["export", "--ckpt_path", "last", "--overwrite"])
    assert report("runs/lit_prune")["perplexity"] == pytest.approx(first["perplexity"])
    assert Path("runs/lit_prune/checkpoints/last.ckpt").is_file()


def test_a_quantised_model_is_exported_from_its_checkpoint_and_validated(capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--output=runs/x", "--pruning.recovery=QLoRA", "--pruning.recovery.form=requantised")
    told = report()
    assert told["quantised"]["form"] == "requantised"
    assert told["bytes"] < 0.4 * told["quantised"]["bytes_unquantised"]
    assert list(told["perplexity"]) == ["dense", "pruned", "quantised", "recovered", "requantised"]
    assert told["perplexity"]["requantised"] != told["perplexity"]["recovered"]
    assert told["perplexity"]["quantised"] != told["perplexity"]["pruned"]
    assert told["export"]["perplexity"] == pytest.approx(told["perplexity"]["requantised"])
    main(["export", "--ckpt_path=runs/x/checkpoints/last.ckpt", "--merge", "--output=runs/y"])
    assert report("runs/y")["perplexity"] == pytest.approx(told["perplexity"])
    stored = [Path(run, "model/model.safetensors").read_bytes() for run in ("runs/x", "runs/y")]
    assert stored[0] == stored[1]
    assert "requantised" in Path("runs/y/model/README.md").read_text()
    capsys.readouterr()
    run("validate", "--model.pretrained=runs/x/model")
    assert f"{told['perplexity']['requantised']:.3f}"[:-1] in capsys.readouterr().out


def test_export_in_half_precision_and_of_slices() -> None:
    half = ["--model.dtype=bfloat16", "--trainer.precision=bf16-true", "--pruning.recovery=MaskedLoRA"]
    run("fit", "--output=runs/x", *half)
    main(["export", "--ckpt_path=runs/x/checkpoints/last.ckpt", "--output=runs/y", "--merge", "true"])
    assert AutoModelForCausalLM.from_pretrained("runs/y/model").dtype == torch.bfloat16
    assert report("runs/y")["perplexity"] == pytest.approx(report()["perplexity"])
    run("prune", "--output=runs/h", "--trainer.precision=bf16-true")
    assert AutoModelForCausalLM.from_pretrained("runs/h/model").dtype == torch.bfloat16
    assert report("runs/h")["perplexity"]["pruned"] == report()["perplexity"]["pruned"]  # as fit cuts
    run("fit", "--output=runs/s", "--pruning.method=Slicing", "--pruning.allocation=Uniform", "--pruning.sparsity=0.25")
    main(["export", "--ckpt_path=runs/s/checkpoints/last.ckpt", "--output=runs/t", "--merge"])
    assert report("runs/t")["slice"] == report("runs/s")["slice"]
    assert report("runs/t")["export"]["merged"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "arguments are required: export.ckpt_path"),
        (["--ckpt_path=last"], "`ckpt_path` must be a checkpoint that is there, runs/lit_prune/checkpoints/last.ckpt"),
        (["--ckpt_path=train.txt"], "`ckpt_path` must be a checkpoint of a fit, train.txt cannot be read"),
        (["--ckpt_path=runs/x/checkpoints/last.ckpt", "--pruning.sparsity=0.3"], "`pruning.sparsity` must be what"),
        (
            ["--ckpt_path=runs/x/checkpoints/last.ckpt", "--model.pretrained=other"],
            "`model.pretrained` must be the model that the checkpoint was made from, its weights do not fit",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_exported(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "runs/x" in str(args):
        run("fit", "--output=runs/x")
        new_model({"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 8}).save_pretrained(
            "other"
        )
        shutil.copy(EMBEDDED / "tokenizer.json", "other")
        shutil.copy(EMBEDDED / "tokenizer_config.json", "other")
    output = [] if args[:1] == ["--ckpt_path=last"] else ["--output=runs/y"]
    with pytest.raises(SystemExit) as ended:
        main(["export", *args, *output])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/y").exists()


def test_push_to_hub_comes_after_the_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    sent: list[list[str]] = []

    class Hub:
        def create_repo(self, repo: str, **_fields: object) -> str:
            if repo == "me/unreachable":
                raise ConnectionError("no route to host")
            return f"https://hub/{repo}"

        def upload_folder(self, *, folder_path: Path, **_fields: object) -> None:
            sent.append(sorted(path.name for path in folder_path.iterdir()))

    monkeypatch.setattr("lit_prune.export.hub.HfApi", Hub)
    run("prune", "--output=runs/x", "--push_to_hub=me/model")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(sent[0])
    assert "Sent to https://hub/me/model" in capsys.readouterr().err
    assert "push_to_hub" not in Path("runs/x/config.yaml").read_text()
    with pytest.raises(SystemExit) as ended:
        run("fit", "--output=runs/y", "--push_to_hub=me/unreachable")
    assert ended.value.code == 2
    assert "'me/unreachable' cannot (no route to host). The model is in runs/y/model: send" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained("runs/y/model") is not None


def test_perplexities_of_different_protocols_do_not_stand_together() -> None:
    run("fit", "--output=runs/x")
    run("fit", "--output=runs/x", "--ckpt_path=last", "--trainer.max_steps=3", "--data.val_windows=4")
    told = report()
    assert told["protocol"]["windows"] == 4
    assert told["perplexity"]["dense"] is None
    assert told["perplexity"]["recovered"] is not None


def test_a_run_resumes_in_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    run("fit", "--output=runs/x")
    first = report()
    monkeypatch.setattr("lit_prune.callbacks.dynamic_pruning.cut", None)  # there is no second cut
    run("fit", "--output=runs/x", "--ckpt_path=last", "--trainer.max_steps=4")
    told = report()
    assert told["perplexity"]["dense"] == first["perplexity"]["dense"]
    assert told["perplexity"]["recovered"] != first["perplexity"]["recovered"]
    assert torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert told["sparsity"]["achieved_linears"] == pytest.approx(0.5, abs=1e-3)
    assert len(told["rates"]) == 8


def test_overwrite_replaces_the_folder() -> None:
    run("prune", "--output=runs/x")
    Path("runs/x/mine").write_text("x")
    run("prune", "--output=runs/x", "--overwrite", "--pruning.sparsity=0.3")
    assert report()["sparsity"]["requested"] == 0.3
    assert not Path("runs/x/mine").exists()
    assert [path.name for path in Path("runs").iterdir()] == ["x"]


def test_a_method_that_replaces_the_default_one_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--pruning.method", "SparseGPT", "--print_config"])
    method = yaml.safe_load(capsys.readouterr().out)["pruning"]["method"]
    assert method["class_path"] == "lit_prune.prune.SparseGPT"
    assert SparseGPT(**method["init_args"]).propagate == "pruned"


def test_print_config_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["pruning"]["method"]["class_path"] == "lit_prune.prune.Wanda"
    assert config["pruning"]["allocation"]["class_path"] == "lit_prune.allocate.DLP"
    assert config["pruning"]["recovery"]["class_path"] == "lit_prune.recover.LoRA"
    assert config["pruning"]["calibration"]["num_samples"] == 128
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--pruning.sparsity", "--data.train_files", "--model.pretrained", "--output", "--overwrite"):
        assert option in printed
    assert "A checkpoint to go on from, or `last`" in printed
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "on the test text; writes nothing" in " ".join(capsys.readouterr().out.split())


def test_the_command_line_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert sorted(config) == [
        "checkpoint_every",
        "data",
        "lm_eval",
        "model",
        "output",
        "overwrite",
        "pruning",
        "push_to_hub",
        "seed_everything",
        "tasks",
        "trainer",
    ] or sorted(config) == sorted(
        [
            "checkpoint_every",
            "ckpt_path",
            "data",
            "lm_eval",
            "model",
            "output",
            "overwrite",
            "pruning",
            "push_to_hub",
            "seed_everything",
            "tasks",
            "trainer",
            "weights_only",
        ]
    )
    assert sorted(config["pruning"]) == sorted(
        [
            "allocation",
            "at_step",
            "before",
            "blocks",
            "budget",
            "calibration",
            "distillation",
            "full_checkpoint",
            "ignore",
            "keep_zeros",
            "max_rate",
            "measure",
            "method",
            "min_rate",
            "recovery",
            "schedule",
            "sparsity",
            "statistics",
            "target",
            "targets",
        ]
    )


MISTAKES = [
    (["--push_to_hub=me/model"], r"`push_to_hub` must be left out where HF_HUB_OFFLINE is set"),
    (["--push_to_hub=a b"], r"`push_to_hub` must be the id of a repository, such as name/model, got 'a b'"),
    (
        ["--pruning.recovery=null"],
        r"`pruning.recovery` must be given .*: use MaskedLoRA, FullFineTuning or LoRA, freeze",
    ),
    (["--pruning.at_step=[2,1]"], r"`pruning.at_step` must list rising steps, got \[2, 1\]"),
    (["--pruning.at_step=2"], r"`pruning.at_step` must be below the number of optimizer steps, 2 .*, got 2"),
    (
        ["--pruning.at_step=[0,1]"],
        r"`pruning.recovery` must keep zeros .*, got LoRA\(r=8.*: use MaskedLoRA",
    ),
    (["--pruning.at_step=soon"], r"`pruning.at_step` must be a whole number or a list, got soon\.$"),
    (["--pruning.schedule=Qubic"], r"`pruning.schedule` must be one of Cubic, Linear, OneShot, .*Did you mean Cubic"),
    (["--pruning.before=MaskLoRA"], r"`pruning.before` must be one of FullFineTuning, .*Did you mean MaskedLoRA"),
    (["--pruning.before=LoRA"], r"`pruning.before` must be null where the first cut comes at step 0"),
    (["--checkpoint_every=0"], r"`checkpoint_every` must be at least 1"),
    (["--pruning.sparsity=1.2"], r"`pruning.sparsity` must be in \[0, 1\).*got 1.2"),
    (["--pruning.budget=weights"], r"`pruning.budget` must be one of linears, parameters, got weights\.$"),
    (["--pruning.budget=linear"], r"`pruning.budget` must be one of .*, got linear\. Did you mean linears\?$"),
    (
        ["--pruning.sparsity=50%"],
        r"`pruning.sparsity` must be a number or a list, got 50%\. \(a share is written 0.5\)",
    ),
    (["--pruning.targets=q_proj"], r"`pruning.targets` must be a list, got q_proj\. \(a list is written \[q_proj\]\)$"),
    (
        ["--pruning.method.pattern=2:4"],
        r"got '2:4'. \(2:4 is --pruning.method.pattern NofM --pruning.method.pattern.n 2 --pruning.method.pattern.m 4",
    ),
    (["--pruning.budget=parameters", "--pruning.sparsity=0.9"], r"must be between 0 and 0.7\d* of all parameters"),
    (["--pruning.sparsity=0.8", "--pruning.max_rate=0.7"], r"`pruning.sparsity` must be between 0 and 0.7"),
    (["--pruning.sparsty=0.5"], r"`--pruning.sparsty` is not an option. Did you mean --pruning.sparsity"),
    (
        ["--pruning.method=Wnda"],
        r"`pruning.method` must be one of Magnitude, Slicing, .*Wanda.*got 'Wnda'. Did you mean Wanda",
    ),
    (["--pruning.allocation=DPL"], r"`pruning.allocation` must be one of AlphaPruning, DLP, .*Did you mean DLP"),
    (
        ["--pruning.recovery=Lora"],
        r"`pruning.recovery` must be one of FullFineTuning, LoRA, MaskedLoRA, .*Did you mean LoRA",
    ),
    (["--pruning.allocation.alfa=0.1"], r"`pruning.allocation.alfa` is not a setting of DLP. Did you mean alpha"),
    (["--pruning.allocation.alpha=0.7"], r"`DLP.alpha` must be in \[0, 0.5\], got 0.7"),
    (["--pruning.allocation.alpha=much"], r"`pruning.allocation.alpha` must be a number, got much\.$"),
    (["--pruning.allocation=Plan"], r"`pruning.allocation.path` must be given: Plan needs it"),
    (
        ["--pruning.allocation=Plan", "--pruning.allocation.path=none.yaml"],
        r"`Plan.path` must be a file, got none.yaml",
    ),
    (
        ["--pruning.allocation=Search", "--pruning.allocation.evaluations=5"],
        r"`Search.evaluations` must be at least 16",
    ),
    (
        ["--pruning.allocation=Search", "--pruning.allocation.start=DPL"],
        r"`pruning.allocation.start` must be one of AlphaPruning, DLP, .*Did you mean DLP",
    ),
    (
        ["--pruning.allocation=Search", "--pruning.allocation.state=none/state.json"],
        r"`Search.state` must be a file in a folder that exists, got none/state.json",
    ),
    (["--pruning.method.pattern=NofM"], r"`pruning.allocation` must be Uniform for the pattern NofM, .*MixedNofM"),
    (
        ["--pruning.method.pattern=NofM", "--pruning.allocation=Uniform", "--pruning.sparsity=0.75"],
        r"`pruning.sparsity` must be 0.5 of the linears .*`--pruning.method.pattern.n 1`",
    ),
    (
        ["--pruning.method.pattern=NofM", "--pruning.method.pattern.n=5"],
        r"`NofM.n` must be between 1 and m, 4, .*got 5",
    ),
    (
        ["--pruning.method.pattern=MixedNofM", "--pruning.method.pattern.m=5"],
        r"`MixedNofM.m` must divide .*got 5: self_attn.q_proj of block 0 has 192",
    ),
    (
        ["--pruning.method.pattern=NofN"],
        r"`pruning.method.pattern` must be one of MixedNofM, NofM, Unstructured, .*got 'NofN'. Did you mean NofM",
    ),
    (
        ["--pruning.method.pattern=NofM", "--pruning.method.pattern.k=2"],
        r"`pruning.method.pattern.k` is not a setting of NofM. \(n, m\)",
    ),
    (
        ["--pruning.method.pattern=NofM", "--pruning.method.pattern.n=two"],
        r"`pruning.method.pattern.n` must be a whole number, got two\.$",
    ),
    (
        ["--pruning.method=SparseGPT", "--pruning.method.pattern=NofM", "--pruning.method.pattern.m=6"],
        r"`SparseGPT.span` must be a multiple of 6, .*got 128; pass `--pruning.method.span 126`",
    ),
    (["--pruning.method.pattern.n=2"], r"`pruning.method.pattern` must be given before .*: one of MixedNofM, NofM, Un"),
    (["--pruning.calibration.num_samples=100000"], r"`calibration.num_samples` must be at most \d+, .*got 100000"),
    (
        ["--pruning.calibration.seq_length=1024"],
        r"`pruning.calibration.seq_length` must be at most 512, the model's limit",
    ),
    (["--data.seq_length=513"], r"`data.seq_length` must be at most 512, the model's limit, got 513"),
    (["--data.train_files=none.txt"], r"`data.train_files` must name files that are there, got none.txt"),
    (["--data.val_files=null"], r"`data.val_files` must be given"),
    (["--model.pretrained=./none"], r"`model.pretrained` must be there, got './none': no such file or folder"),
    (["--model.pretrained=nobody/nothing"], r"`model.pretrained`: .*pass a local folder"),
    (
        ["--pruning.statistics=runs/none"],
        r"`pruning.statistics` must be a file that exists, runs/none does not; `lit-prune score`",
    ),
    (["--pruning.targets=[qproj]"], r"`pruning.targets` must match a linear, got 'qproj'"),
    (["--pruning.blocks=model.leyers"], r"`pruning.blocks` must be a path in the model, got 'model.leyers'"),
    (["--ckpt_path=last"], r"`ckpt_path` must be a checkpoint that is there, runs/x/checkpoints/last.ckpt is not"),
    (["--output=train.txt"], r"`output` must be a folder, train.txt is a file"),
    (["--output=/proc/run"], r"`output` must be in a folder that can be written"),
    (["--config=none.yaml"], r"`--config` must be a file that is there, got .*none.yaml"),
    (["--config=empty.yaml"], r"`--config` must be a YAML file of settings, got an empty one"),
    (
        ["--config=prunning.yaml"],
        r"`prunning.sparsity` is not a setting: there is no group `prunning`. Did you mean pruning",
    ),
    (["--model.pretrained=embeded"], r"there is no model 'embeded' here. Did you mean embedded"),
    (["--trainer.accelerator=gpu"], r"No supported gpu backend found"),
    (["--trainer.max_steps=-1"], r"`trainer.max_steps` or `trainer.max_epochs` must be given"),
    (
        ["--trainer.max_steps=-1", "--trainer.max_epochs=-1"],
        r"`trainer.max_steps` or `trainer.max_epochs` must be given",
    ),
    (
        ["--pruning.recovery.target_modules=[qproj]"],
        r"`LoRA.target_modules` must match linears of the model, got 'qproj'",
    ),
    (["--trainer.max_steps=-5"], r"`trainer.max_steps` must be at least 1, or -1 .*, got -5"),
    (["--trainer.max_steps=0"], r"`trainer.max_steps` must be at least 1, .*, got 0; `lit-prune prune` prunes"),
    (
        ["--model.architecture={'model_type': 'llama'}", "--pruning.method=null", "--pruning.recovery=QLoRA"],
        r"`pruning.recovery` must be null where `model.architecture` begins from random weights",
    ),
    (["--pruning.ignore=['(']"], r"`pruning.ignore` must be suffixes or regular expressions"),
    (
        [
            '--trainer.callbacks=[{"class_path": "lit_prune.callbacks.DynamicPruningCallback",'
            ' "init_args": {"method": null}}]'
        ],
        r"`trainer.callbacks` must not hold a DynamicPruningCallback",
    ),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        run("fit", "--output=runs/x", *args)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    line = next(line for line in told.splitlines() if line.startswith("lit-prune: error: "))
    assert re.search(message, line), line
    assert "Traceback" not in told
    assert sorted(here.rglob("*")) == before


def test_what_settings_tell_is_refused_before_weights_and_text_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"lit_prune": {"settings": {"pruning.sparsity": 0.5, "data.seed": 7}}}, "run.ckpt")
    monkeypatch.setattr("lit_prune.fit.module.load_model", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr("lit_prune.data.datamodule.TextDataModule.stream", lambda *_: pytest.fail("text was read"))
    for args, message in (
        (["--pruning.at_step=2"], "`pruning.at_step` must be below"),
        (["--pruning.recovery.target_modules=[qproj]"], "`LoRA.target_modules` must match linears"),
        (["--pruning.targets=[qproj]"], "`pruning.targets` must match a linear"),
        (["--ckpt_path=run.ckpt"], "`data.seed` must be what the checkpoint was made with, 7, got 0"),
    ):
        with pytest.raises(SystemExit):
            run("fit", "--output=runs/x", *args)
        assert message in capsys.readouterr().err


def test_the_verb_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--config", "run.yaml", "prune"])
    assert "the verb must come first: lit-prune prune --config run.yaml" in capsys.readouterr().err


def test_a_misspelt_key_in_a_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("pruning:\n  sparsty: 0.5\n")
    with pytest.raises(SystemExit) as ended:
        run("fit", "--config=run.yaml")
    assert ended.value.code == 2
    assert "`pruning.sparsty` is not a setting. Did you mean pruning.sparsity" in capsys.readouterr().err


def test_a_misspelt_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prone"])
    assert ended.value.code == 2
    assert "fit, validate, test, prune, score, export, evaluate" in capsys.readouterr().err


def test_an_output_that_exists_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/mine").write_text("x")
    for verb in ("fit", "prune", "score"):
        with pytest.raises(SystemExit) as ended:
            run(verb, "--output=runs/x")
        assert ended.value.code == 2
        assert "`--overwrite`" in capsys.readouterr().err
    assert [path.name for path in Path("runs/x").iterdir()] == ["mine"]


def test_prune_on_disk_writes_what_prune_in_memory_writes(capsys: pytest.CaptureFixture[str]) -> None:
    stored = "--model.dtype=bfloat16"  # as the embedded model is stored
    run("prune", "--output=runs/x", stored)
    run("prune", "--output=runs/y", stored, "--model.on_disk=true")
    expected, found = report(), report("runs/y")
    for field in ("perplexity", "protocol", "sparsity", "rates", "achieved", "parameters", "bytes", "export"):
        assert found[field] == expected[field], field
    in_memory, on_disk = (AutoModelForCausalLM.from_pretrained(f"runs/{name}/model").state_dict() for name in "xy")
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in in_memory.items())
    assert sorted(path.name for path in Path("runs").iterdir()) == ["x", "y"]
    assert len(list(Path("runs/y/model").glob("model-*-of-00009.safetensors"))) == 9
    again = ["--model.pretrained=runs/y/model", stored, "--model.on_disk=true", "--pruning.sparsity=0.7"]
    run("prune", "--output=runs/z", *again)
    told = report("runs/z")
    assert told["sparsity"]["achieved_linears"] == pytest.approx(0.7, abs=1e-3)
    assert told["sparsity"]["found"] == pytest.approx(0.5, abs=1e-3)
    assert told["perplexity"]["before"] == pytest.approx(expected["perplexity"]["pruned"])  # not dense
    assert "perplexity_before" in told["seconds"]
    run("validate", "--model.pretrained=runs/y/model", stored, "--model.on_disk=true")
    assert "val/perplexity" in capsys.readouterr().out


def test_on_disk_is_refused_where_it_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, args, told in (
        ("fit", ["--model.dtype=auto"], "`model.on_disk` must be false for fit, training keeps all weights in memory"),
        ("prune", [], "`model.dtype` must be bfloat16 with `model.on_disk`"),
        ("prune", ["--model.dtype=auto", "--trainer.precision=bf16-true"], "`trainer.precision` must be 32-true with"),
        ("prune", ["--model.architecture={'model_type': 'llama'}"], "`model.on_disk` must be false with `model.arch"),
    ):
        with pytest.raises(SystemExit):
            run(verb, "--output=runs/x", "--model.on_disk=true", *args)
        assert told in (message := capsys.readouterr().err)
        assert len(message.strip().splitlines()) == 1
        assert not Path("runs").exists()


def test_a_prune_on_disk_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("lit_prune.prune.Wanda.score", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        run("prune", "--output=runs/x", "--model.dtype=auto", "--model.on_disk=true")
    assert sorted(path.name for path in Path().iterdir()) == ["empty.yaml", "prunning.yaml", "train.txt", "val.txt"]
