"""The command run on the embedded model with little text, in a folder of its own."""

import json
import re
import warnings
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from lit_prune.cli.main import main

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
    Path("page.yaml").write_text("A page: with text: that is no YAML\n")
    Path("prunning.yaml").write_text("prunning:\n  sparsity: 0.5\n")
    warnings.simplefilter("ignore")
    return tmp_path


def files() -> list[str]:
    return ["--data.train_files=train.txt", "--data.val_files=val.txt"]


def run(verb: str, *args: str) -> None:
    main([verb, *SMALL, *files(), *(STEPS if verb == "fit" else []), *args])


def report(folder: str = "runs/x") -> dict:
    return json.loads(Path(folder, "report.json").read_text())


def last_cut(folder: str = "runs/x") -> dict:
    return report(folder)["cuts"][-1]


def check_refused(message: str, capsys: pytest.CaptureFixture[str], *args: str, verb: str = "fit") -> None:
    """Checks that ``args`` end the command in one line that matches ``message``, before any work.

    No model is run, so that no perplexity is measured and no block scored, and nothing is written.
    """
    before = sorted(Path().rglob("*"))
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(PreTrainedModel, "__call__", lambda *_, **__: pytest.fail("a model was run"), raising=False)
        with pytest.raises(SystemExit) as ended:
            run(verb, "--output=runs/x", *args)
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    line = next(line for line in printed.splitlines() if line.startswith("lit-prune: error: "))
    assert re.search(message, line), line
    assert "Traceback" not in printed
    assert sorted(Path().rglob("*")) == before
