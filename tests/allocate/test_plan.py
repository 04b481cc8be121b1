"""Plan: a file of rates is followed or refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_prune.allocate import DLP, Allocation, Plan, Search, Uniform, write_plan
from lit_prune.errors import InputError
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune, score
from lit_prune.pruning import Method, MixedNofM, Wanda
from lit_prune.recipe import Recipe
from lit_prune.shrink import MLPWidth
from lit_prune.slice import Slicing
from tests.allocate.blocks import rates
from tests.conftest import small_model


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
            r"must be the mean sparsity of the blocks, 0.5, got 0.4. Edit the plan, or pass `--pruning.sparsity 0.4 "
            "--pruning.budget linears`, without a `pruning.target_parameters` or",
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


LINEARS = """
0: 0.5
1:
  rate: 0.5
  self_attn.q_proj: 0.75
  self_attn.k_proj: 0.5
  self_attn.v_proj: 0.5
  self_attn.o_proj: 0.25
  mlp.gate_proj: 0.5
  mlp.up_proj: 0.5
  mlp.down_proj: 0.5
2: 0.5
"""


def test_rates_of_linears(tmp_path: Path, batches: list[torch.Tensor]) -> None:
    model, by_linear = small_model(), plan(tmp_path, LINEARS)
    assert by_linear.levels == {"linears", "parts"}
    assert not by_linear.is_uniform()
    assert rates(by_linear, [1, 1, 1], 0.5) == pytest.approx([0.5] * 3)
    pruned = prune(model, batches, Recipe(Wanda(), 0.5, by_linear))
    blocks = find_blocks(model)
    found = [
        {
            name: linear.pruned / linear.size
            for name, linear in block.linears.items()
            if name.endswith(("q_proj", "o_proj"))
        }
        for block in blocks
    ]
    even = {"self_attn.q_proj": 0.5, "self_attn.o_proj": 0.5}
    assert found == [even, {"self_attn.q_proj": 0.75, "self_attn.o_proj": 0.25}, even]
    assert pruned.rates == pruned.achieved == [0.5] * 3
    assert pruned.linears is not None
    write_plan(tmp_path / "again.yaml", pruned.rates, pruned.scores, "", pruned.linears)
    assert Plan(str(tmp_path / "again.yaml")).named_rates(Wanda().named_sizes(model, blocks)) == pruned.linears


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  rate: 0.5\n", "", "block 1 in .* must have a `rate`, the mean of the rates below it"),
        ("rate: 0.5", "rate: 0.6", "the rate of block 1 in .* must be the mean of the rates below it, 0.5, got 0.6"),
        ("k_proj: 0.5", "k_proj: 1.5", r"the rate of self_attn.k_proj of block 1 must be in \[0, 1\], got 1.5"),
        (
            "self_attn.k_proj",
            "kay",
            "block 1 in .* must have rates of all that is pruned in it, self_attn.q_proj, .*; kay is not",
        ),
        ("  self_attn.k_proj: 0.5\n", "", "block 1 in .* must have rates .*; self_attn.k_proj is missing"),
    ],
)
def test_rates_of_linears_that_do_not_fit(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in LINEARS
    model = small_model()
    with pytest.raises(InputError, match=f"`Plan.path`: {message}"):
        plan(tmp_path, LINEARS.replace(old, new)).named_rates(Wanda().named_sizes(model, find_blocks(model)))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Slicing(), "must have one rate per block for Slicing, got rates of linears or parts: .* for masks"),
        (Wanda(MixedNofM(8)), r"must have one rate per block for the pattern MixedNofM\(m=8\), .* need Unstructured"),
    ],
    ids=str,
)
def test_methods_without_rates_of_linears(method: Method, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"`pruning.allocation` {message}"):
        Recipe(method, 0.5, plan(tmp_path, LINEARS)).check(small_model())


@pytest.mark.parametrize("allocation", [DLP(), Search(Uniform(), evaluations=26)], ids=str)
def test_a_plan_that_was_made_for_a_target_meets_it(
    allocation: Allocation, tmp_path: Path, batches: list[torch.Tensor]
) -> None:
    """The channels left are multiples of 8, so that the mean of the rates is not what the target amounts to."""
    method, path = MLPWidth(multiple=8), tmp_path / "plan.yaml"
    asked = Recipe(method, allocation=allocation, target_parameters=16_000)
    scored = score(small_model(), batches, asked)
    assert abs(scored.planned - scored.target) > 1e-3
    write_plan(path, scored.rates, scored.scores, "")
    model = small_model()
    pruned = prune(model, batches, replace(asked, allocation=Plan(str(path))))
    assert pruned.rates == pruned.achieved == pytest.approx(scored.rates)
    assert pruned.target == pytest.approx(scored.planned)
    further = Recipe(method, allocation=Plan(str(path)), target_parameters=20_000)
    with pytest.raises(InputError, match="`Plan.path`: the mean of the rates in .*, without a `pruning.target_par"):
        further.check(small_model())


def test_a_plan_of_another_mean_is_not_taken_for_rounding(tmp_path: Path) -> None:
    """A multiple is a sixth of a block here, and an eighteenth of the three."""
    for text, mean in (("0: 0.5\n1: 0.5\n2: 0.333333\n", 0.45), ("0: 0.5\n1: 0.5\n2: 0.5\n", 0.45)):
        Recipe(MLPWidth(8), mean, plan(tmp_path, text)).check(small_model())
    with pytest.raises(InputError, match="`Plan.path`: the mean of the rates in .* must be .* 0.37, got 0.444"):
        Recipe(MLPWidth(8), 0.37, plan(tmp_path, "0: 0.5\n1: 0.5\n2: 0.333333\n")).check(small_model())


def test_the_rates_of_a_plan(tmp_path: Path) -> None:
    own = plan(tmp_path, "0: 0.2\n1: 0.6\n")
    assert own.planned_rates(2) == Search(own).planned_rates(2) == [0.2, 0.6]
    assert own.planned_rates(1) is own.planned_rates(3) is DLP().planned_rates(2) is None
