"""The commands and snippets of the pages on workflows, run as they stand, on a small model and a little text."""

import re
import runpy
import shlex
import tomllib
import warnings
from pathlib import Path

import pytest

from lit_prune.cli.main import main
from lit_prune.models.load import load_tokenizer
from tests.conftest import small_model

ROOT = Path(__file__).parent.parent
QUICK = {
    "prune": ["--pruning.calibration.num_samples=2", "--pruning.calibration.seq_length=32", "--data.val_windows=2"],
    "fit": ["--trainer.max_steps=2", "--data.batch_size=2", "--data.val_windows=2"],
}
TEXT = ["--data.seq_length=32", "--data.train_files=train.txt", "--data.val_files=val.txt"]
HUB = "--tasks arc_easy,piqa"  # its data is there alone


def docs(part: str) -> list[dict[str, str]]:
    """A little documentation, in the place of Python's own."""
    words = ["items", "files", "names", "values", "errors", "threads", "modules", "numbers"]
    pieces = [
        f"def {part}_{word}_{number}(path, mode=None)\nReturn the {number} open {part} {word} that were asked for here."
        for word in words
        for number in range(6)
    ]
    lines = [f"Remember the {part} {other} before you ask for more {word}." for word in words for other in words]
    return [{"name": part, "text": "\n\n".join(pieces) + "\n\n" + "\n".join(lines)}]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    warnings.simplefilter("ignore")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_prune.data.python_docs.python_docs", docs)
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    Path("train.txt").write_text("Return the number of items in a container, or raise an error.\n" * 80)
    Path("val.txt").write_text("Open the file, read its lines and close it again when that is done.\n" * 40)
    for where in ("small", "runs/quickstart/model"):
        small_model(vocab_size=4096, num_hidden_layers=2, max_position_embeddings=512).save_pretrained(where)
        load_tokenizer("embedded").save_pretrained(where)
    return tmp_path


def commands(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^    ((?:lit-prune|python) .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if HUB not in line]


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *args = command
    if program == "python":
        monkeypatch.setattr("sys.argv", args)
        runpy.run_path(args[0], run_name="__main__")
        return
    begins = [*TEXT, "--model.pretrained=small"] if any(word.startswith("configs/quickstart") for word in args) else []
    progress = [] if args[0] == "evaluate" else ["--trainer.enable_progress_bar=false"]
    main([*args, *QUICK.get(args[0], []), *begins, *progress])


@pytest.mark.parametrize(("page", "count"), [("prune_then_finetune.md", 7), ("evaluation.md", 3)])
def test_every_command_runs(page: str, count: int, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands(page)
    assert len(found) == count
    for command in found:
        run(command, monkeypatch)
        if "--output" in command:
            assert Path(command[command.index("--output") + 1], "report.json").is_file()


def test_the_extra_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(name.startswith("lm-eval") for name in extras["eval"])
