"""The entry point: what it answers by itself, and how errors end."""

import subprocess
import sys

import pytest

from lit_prune.cli.main import main

HEAVY = ("torch", "transformers", "lightning", "jsonargparse", "matplotlib", "datasets")


def test_the_verb_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--config", "run.yaml", "prune"])
    assert "the verb must come first: lit-prune prune --config run.yaml" in capsys.readouterr().err


def test_several_processes_say_which_one_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        main(["prone"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("lit-prune: error (process 1): the verb must be one of fit, validate")


@pytest.mark.parametrize(
    ("args", "code", "printed"),
    [
        (["--version"], 0, "lit-prune 0."),
        (["--help"], 0, "usage: lit-prune VERB"),
        (["prone"], 2, "Did you mean prune?"),
        (["fit", "--pruning.sparsty=0.5"], 2, "Did you mean --pruning.sparsity"),
        (["fit", "--trainer.max_step=5"], 2, "Did you mean --trainer.max_steps"),
    ],
)
def test_quick_answers_import_nothing_heavy(args: list[str], code: int, printed: str) -> None:
    lines = (
        "import sys",
        "from lit_prune.cli.main import main",
        "try:",
        f"    main({args})",
        "finally:",
        f"    assert not {set(HEAVY)} & sys.modules.keys()",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert printed in done.stdout + done.stderr


def test_an_interrupt_ends_with_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_prune.cli.parser.run", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["prune"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "lit-prune: interrupted\n"


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "lit_prune.cli", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("lit-prune ")
