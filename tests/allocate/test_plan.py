"""Plan: a file of rates is followed or refused."""

from pathlib import Path

import pytest

from lit_prune.allocate import Plan
from lit_prune.errors import InputError
from tests.allocate.blocks import rates


def plan(tmp_path: Path, text: str) -> Plan:
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    return Plan(str(tmp_path / "plan.yaml"))


def test_plan_is_followed(tmp_path: Path) -> None:
    assert rates(plan(tmp_path, "0: 0.2\n1: 0.8\n"), [1, 1], 0.5) == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: 0.2\n1: 0.8\n2: 0.5\n", "the model has blocks 0 to 1, .* names 2"),
        ("0: 0.5\n", "has none for block 1"),
        ("0: 0.05\n1: 0.95\n", r"the rate of block 1 must be between 0.1 .* and 0.9 .*got 0.95"),
        ("0: 0.95\n1: 0.05\n", r"the rate of block 0 must be between 0 .* and 0.9 .*got 0.95"),
        (
            "0: 0.2\n1: 0.6\n",
            r"must be the mean sparsity of the blocks, 0.5, got 0.4. Edit the plan, or pass `--pruning.sparsity 0.4",
        ),
    ],
)
def test_plan_that_does_not_fit(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(tmp_path, text).check([10, 10], 0.5, [0, 0.1], 0.9)


def test_plan_mean_is_weighted_by_size(tmp_path: Path) -> None:
    plan(tmp_path, "0: 0.2\n1: 0.6\n").check([10, 30], 0.5, [0, 0], 0.99)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must map blocks to rates"),
        ("- 1\n", "must map blocks to rates"),
        ("a: 0.5\n", "blocks must be whole numbers, got 'a'"),
        ("0: 1.5\n", r"rate of block 0 must be in \[0, 1\], got 1.5"),
        ("0: [\n", "must be YAML"),
    ],
)
def test_plan_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(tmp_path, text)


def test_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`Plan.path` must be a file, got .*lit-prune score"):
        Plan(str(tmp_path / "none.yaml"))
