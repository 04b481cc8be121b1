"""The verbs, from their arguments to what they leave in the output folder."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune.cli.main import main
from lit_prune.evaluation.perplexity import measure
from lit_prune.masks.zeros import zeros
from tests.cli.conftest import SMALL, check_refused, files, last_cut, report, run
from tests.custom_code import write_custom_model


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
    scores, rates = last_cut()["scores"], last_cut()["rates"]
    assert len(scores) == len(rates) == 8
    assert max(rates) - min(rates) == pytest.approx(0.3, abs=1e-6)
    assert {"score", "prune", "train"} <= told["seconds"].keys()
    assert told["parameters"] > 1e6
    assert told["bytes"] > told["parameters"]
    assert told["versions"]["torch"] == torch.__version__
    assert told["export"]["perplexity"] == pytest.approx(perplexity["recovered"], rel=1e-3)

    opened = AutoModelForCausalLM.from_pretrained("runs/x/model", dtype="float32")
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


def test_prune_trains_nothing() -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    run("prune", "--output=runs/x", "--pruning.allocation=Uniform", *logger)
    assert "perplexity/pruned" in next(Path("logs").rglob("metrics.csv")).read_text()  # once it is finalised
    told = report()
    assert told["perplexity"]["recovered"] is None
    assert told["perplexity"]["pruned"] > told["perplexity"]["dense"]
    assert not Path("runs/x/model/adapter_config.json").exists()
    assert last_cut()["rates"] == pytest.approx([0.5] * 8)
    assert "train" not in told["seconds"]


def test_score_writes_a_plan_that_prune_and_fit_accept(capsys: pytest.CaptureFixture[str]) -> None:
    run("score", "--output=runs/score", "--pruning.allocation.alpha=0.2")
    out = capsys.readouterr().out
    assert "block" in out
    listed = re.findall(r"^\S*runs/score/(\S+)", out, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in Path("runs/score").iterdir())
    assert not Path("runs/score/model").exists()
    planned = yaml.safe_load(Path("runs/score/plan.yaml").read_text())
    assert sum(planned.values()) / 8 == pytest.approx(0.5, abs=1e-5)
    assert max(planned.values()) - min(planned.values()) == pytest.approx(0.4, abs=1e-5)
    Path("plan.yaml").write_text("".join(f"{block}: {0.3 if block % 2 else 0.7}\n" for block in range(8)))
    plan = ["--pruning.allocation=Plan", "--pruning.allocation.path=plan.yaml"]
    run("prune", "--output=runs/x", *plan)
    assert last_cut()["rates"] == pytest.approx([0.7, 0.3] * 4)
    run("fit", "--output=runs/y", *plan)
    assert last_cut("runs/y")["achieved"] == pytest.approx([0.7, 0.3] * 4, abs=1e-3)


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
        r"`pruning.statistics` must be of this model and this calibration text, runs/look/statistics.safetensors "
        r"differs: other calibration tokens; `pruning.calibration.num_samples` 4, now 3; `calibration.text` train.txt, "
        r"now val",
        capsys.readouterr().err,
    )
    assert not Path("runs/other").exists()
    monkeypatch.setattr("lit_prune.pipeline.Stream", lambda *_: pytest.fail("the model ran"))
    run("prune", "--output=runs/swept", "--pruning.allocation=OWL", "--pruning.sparsity=0.6", stored)
    assert last_cut("runs/swept")["rates"] == last_cut("runs/plain")["rates"]
    assert report("runs/swept")["perplexity"] == report("runs/plain")["perplexity"]
    run("score", "--output=runs/again", "--pruning.allocation=LayerRedundancy", stored)
    run("fit", "--output=runs/fit", "--pruning.allocation=LayerRedundancy", "--pruning.statistics=runs/again")
    assert last_cut("runs/fit")["rates"] == pytest.approx(report("runs/again")["rates"])


def test_score_searches_and_its_plan_says_how_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart_masks.yaml"
    search = ["--pruning.allocation=Search", "--pruning.allocation.start=OWL", "--pruning.allocation.start.lam=0.1"]
    search += ["--pruning.allocation.evaluations=80", "--pruning.allocation.state=state.json", "--pruning.sparsity=0.6"]
    score = ["score", f"--config={quickstart}", *SMALL, *files(), *search]
    main([*score, "--output=runs/look"])
    told = json.loads(Path("runs/look/report.json").read_text())
    assert told["recipe"]["allocation"].startswith("Search(start=OWL(threshold=5.0, lam=0.1), evaluations=80")
    assert 40 <= told["search"]["evaluations"] <= 80
    assert told["search"]["loss_end"] < told["search"]["loss_start"]
    plan = Path("runs/look/plan.yaml").read_text()
    line = f"{told['search']['evaluations']} evaluations of a calibration window in"
    assert f"# search: {line}" in plan
    assert line in " ".join(capsys.readouterr().out.split())
    assert len(json.loads(Path("state.json").read_text())["losses"]) == told["search"]["evaluations"]
    main([*score, "--output=runs/again"])  # all is in the state
    assert json.loads(Path("runs/again/report.json").read_text())["rates"] == told["rates"]
    run("prune", "--output=runs/x", *search)
    assert last_cut()["rates"] == told["rates"]
    assert report()["search"] == told["search"]
    assert "search of the rates" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("prune", "--output=runs/y", *search, "--pruning.allocation.start.lam=0.2")
    assert re.search(
        r"`pruning.allocation.state` must be of the same search, .*lam=0.1\), now OWL", capsys.readouterr().err
    )
    assert not Path("runs/y").exists()


def test_n_of_m() -> None:
    pattern = ["--pruning.method.pattern=NofM", "--pruning.method.pattern.n=2", "--pruning.method.pattern.m=4"]
    run("fit", "--output=runs/x", "--pruning.allocation=Uniform", *pattern)
    told = report()
    assert told["recipe"]["method"] == "Wanda(pattern=NofM(n=2, m=4), propagate='dense')"
    assert last_cut()["achieved"] == [0.5] * 8
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
    assert all(rate * 8 == round(rate * 8) for rate in last_cut()["rates"])
    plan = re.search(r"--pruning.allocation Plan.*", Path("runs/score/plan.yaml").read_text())
    run("prune", "--output=runs/y", *mixed, *plan[0].split())
    assert last_cut("runs/y")["rates"] == last_cut()["rates"]


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
    assert last_cut("runs/y")["rates"] == pytest.approx(last_cut()["rates"], abs=1e-5)
    assert last_cut("runs/z")["rates"] == pytest.approx(last_cut()["rates"], abs=1e-5)


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
    assert len(re.findall(r"val/perplexity\D+\d+\.\d{3}\s", printed)) == 1
    assert len(re.findall(r"test/perplexity\D+\d+\.\d{3}\s", printed)) == 1
    assert not Path("runs").exists()
    assert not Path("lightning_logs").exists()


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
    monkeypatch.setattr("lit_prune.export.hub.get_token", lambda: "hf_x")
    run("prune", "--output=runs/x", "--push_to_hub=me/model")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(sent[0])
    assert "Sent to https://hub/me/model" in capsys.readouterr().err
    assert "push_to_hub" not in Path("runs/x/config.yaml").read_text()
    with pytest.raises(SystemExit) as ended:
        run("fit", "--output=runs/y", "--push_to_hub=me/unreachable")
    assert ended.value.code == 2
    assert (
        "'me/unreachable' (no route to host). The model is in runs/y/model: upload it with" in capsys.readouterr().err
    )
    assert AutoModelForCausalLM.from_pretrained("runs/y/model") is not None


def test_overwrite_replaces_the_folder() -> None:
    run("prune", "--output=runs/x")
    Path("runs/x/mine").write_text("x")
    run("prune", "--output=runs/x", "--overwrite", "--pruning.sparsity=0.3")
    assert report()["sparsity"]["requested"] == 0.3
    assert not Path("runs/x/mine").exists()
    assert [path.name for path in Path("runs").iterdir()] == ["x"]


def test_prune_on_disk_writes_what_prune_in_memory_writes(capsys: pytest.CaptureFixture[str]) -> None:
    stored = "--model.dtype=bfloat16"  # as the embedded model is stored
    run("prune", "--output=runs/x", stored)
    run("prune", "--output=runs/y", stored, "--model.on_disk=true")
    expected, found = report(), report("runs/y")
    for field in ("perplexity", "protocol", "sparsity", "parameters", "bytes", "export"):
        assert found[field] == expected[field], field
    for field in ("rates", "achieved"):
        assert found["cuts"][0][field] == expected["cuts"][0][field], field
    in_memory, on_disk = (AutoModelForCausalLM.from_pretrained(f"runs/{name}/model").state_dict() for name in "xy")
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in in_memory.items())
    assert sorted(path.name for path in Path("runs").iterdir()) == ["x", "y"]
    assert len(list(Path("runs/y/model").glob("model-*-of-00009.safetensors"))) == 9
    again = ["--model.pretrained=runs/y/model", stored, "--model.on_disk=true", "--pruning.sparsity=0.7"]
    run("prune", "--output=runs/z", *again)
    told = report("runs/z")
    assert told["sparsity"]["achieved_linears"] == pytest.approx(0.7, abs=1e-3)
    assert told["sparsity"]["before"] == pytest.approx(0.5, abs=1e-3)
    assert told["perplexity"]["before"] == pytest.approx(expected["perplexity"]["pruned"])  # not dense
    assert "perplexity_before" in told["seconds"]
    run("validate", "--model.pretrained=runs/y/model", stored, "--model.on_disk=true")
    assert "val/perplexity" in capsys.readouterr().out


def test_a_prune_on_disk_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("lit_prune.pruning.Wanda.score", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        run("prune", "--output=runs/x", "--model.dtype=auto", "--model.on_disk=true")
    assert sorted(path.name for path in Path().iterdir()) == [
        "empty.yaml",
        "page.yaml",
        "prunning.yaml",
        "train.txt",
        "val.txt",
    ]


def test_a_model_with_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    write_custom_model(Path("own"))
    own = ["--model.pretrained=own", "--data.seq_length=64"]
    check_refused(r"`model.trust_remote_code` must be true for 'own', .* \(own/configuration_own.py", capsys, *own)
    run("prune", "--output=runs/x", *own, "--model.trust_remote_code=true")
    assert report()["export"]["verified"]
    assert Path("runs/x/model/modeling_own.py").is_file()
