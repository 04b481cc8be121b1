"""Runs that are resumed from a checkpoint, and checkpoints that are refused."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lit_prune.fit.module import PrunableLM
from lit_prune.models.load import EMBEDDED, load_model
from tests.cli.conftest import report, run


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_interrupted_measurement(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PrunableLM, f"{'validation' if verb == 'validate' else 'test'}_step", stop)
    with pytest.raises(SystemExit) as ended:
        run(verb, "--data.test_files=val.txt")
    assert ended.value.code == 130


def test_another_exit_keeps_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*args: object) -> None:
        sys.exit(3)

    monkeypatch.setattr(PrunableLM, "on_train_batch_end", leave)
    with pytest.raises(SystemExit) as ended:
        run("fit", "--output=runs/x", "--trainer.max_steps=2")
    assert ended.value.code == 3


def test_an_interrupted_run_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: PrunableLM, *args: object) -> None:
        if self.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PrunableLM, "on_train_batch_end", stop)
        with pytest.raises(SystemExit) as ended:
            run("fit", "--output=runs/x", "--trainer.max_steps=6")
    assert ended.value.code == 130
    assert not Path("runs/x/model").exists()
    run("fit", "--output=runs/x", "--ckpt_path=last", "--trainer.max_steps=6")
    assert torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert report()["perplexity"]["recovered"] < report()["perplexity"]["pruned"]


OTHER_RUNS = [
    (["--pruning.sparsity=0.8"], "`pruning.sparsity` must be what the checkpoint was made with, 0.5, got 0.8"),
    (["--pruning.recovery.r=4"], "`pruning.recovery` must be what the checkpoint was made with, MaskedLoRA(r=8"),
    (["--pruning.at_step=1"], "`pruning.at_step` must be what the checkpoint was made with, 0, got 1"),
    (["--pruning.method=null"], "`pruning.method` must be what the checkpoint was made with, Wanda("),
    (["--data.seed=1"], "`data.seed` must be what the checkpoint was made with, 0, got 1"),
    (["--data.batch_size=2"], "`data.batch_size` must be what the checkpoint was made with, 4, got 2"),
    (["--data.seq_length=32"], "`data.seq_length` must be what the checkpoint was made with, 64, got 32"),
    (["--data.train_files=other.txt"], "`data.train_files (or data.source)` must be what the checkpoint was made"),
    (["--model.lr=1"], "`model.lr` must be what the checkpoint was made with, 0.001, got 1.0"),
    (["--model.pretrained=other"], "`model.pretrained` must be the model that the checkpoint was made from; its"),
    (["--ckpt_path=dense.ckpt"], "whole checkpoint of a fit with a DynamicPruningCallback, got dense.ckpt"),
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
    monkeypatch.setattr("lit_prune.callbacks.dynamic_pruning.prune", None)  # there is no second cut
    run("fit", "--output=runs/x", "--ckpt_path=last", "--trainer.max_steps=4")
    told = report()
    assert told["perplexity"]["dense"] == first["perplexity"]["dense"]
    assert told["perplexity"]["recovered"] != first["perplexity"]["recovered"]
    assert torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert told["sparsity"]["achieved_linears"] == pytest.approx(0.5, abs=1e-3)
    assert len(told["cuts"][-1]["rates"]) == 8
