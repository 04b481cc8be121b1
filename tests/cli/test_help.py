"""The help of a verb."""

import re

import pytest

from lit_prune.cli.help import plain
from lit_prune.cli.main import main


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("A :class:`~datetime.timedelta` or ``None``. (default: null)", "A timedelta or None. (default: null)"),
        ("Stops early. Default: ``None``. (default: null)", "Stops early. (default: null)"),
        ("Sets it. .. note:: Not here.", "Sets it. Note: Not here."),
    ],
)
def test_markup_is_removed(text: str, printed: str) -> None:
    assert plain(text) == printed


def test_groups_of_this_project_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lit-prune fit [--config FILE] [options]\n")
    order = ["--output", "--ckpt_path", "--model.lr", "--data.source", "--pruning.sparsity", "--lm_eval", "--trainer"]
    places = [re.search(rf"^  {option}\b", printed, re.MULTILINE).start() for option in order]
    assert places == sorted(places)
    assert "``" not in printed
    assert ":class:" not in printed
