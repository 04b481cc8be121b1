"""The line of an error: with the process where there are several, on stderr, with exit code 2."""

import pytest

from lit_prune.cli.failure import fail, rank


def test_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        fail("`model.lr` must be above 0, got -1.")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "lit-prune: error: `model.lr` must be above 0, got -1.\n"


def test_another_process_says_which_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "3")  # comes before LOCAL_RANK
    assert rank() == 3
    with pytest.raises(SystemExit):
        fail("no")
    assert capsys.readouterr().err == "lit-prune: error (process 3): no\n"
