"""Verbs and options are read from the source; that they are those of the full parser, test_answers.py compares."""

import subprocess
import sys

import pytest

from lit_prune.cli import signatures


def test_options_of_groups_classes_and_verbs() -> None:
    options = signatures.options("export")
    assert {"--output", "--pruning.sparsity", "--data.seq_length", "--lm_eval.limit", "--trainer.max_steps"} <= options
    assert {"--ckpt_path", "--merge", "--format", "--config"} <= options
    assert "--merge" not in signatures.options("fit")
    assert "--model" in options
    assert "--datamodule" not in options


def test_the_summary_is_the_first_line_of_a_verb() -> None:
    for verb in signatures.VERBS:
        assert signatures.summary(verb)
        assert "\n" not in signatures.summary(verb)


def test_a_class_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(signatures.GROUPS, "model", ("lit_prune.fit.module", "NoSuchLM"))
    with pytest.raises(LookupError, match=r"lit_prune\.fit\.module has no class NoSuchLM"):
        signatures.options("fit")
    monkeypatch.setitem(signatures.GROUPS, "model", ("lit_prune.no_such_module", "PrunableLM"))
    with pytest.raises(LookupError, match=r"lit_prune\.no_such_module is not installed"):
        signatures.options("fit")


def test_nothing_heavy_is_imported() -> None:
    program = "import sys, lit_prune.cli.signatures as s; s.options('fit'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
