"""Statistics behind pruned blocks: a trial of the rates that a search starts from is the cut itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate import Plan
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream, observe
from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import evaluating, measure
from lit_prune.models.families import Block, find_blocks
from lit_prune.pipeline import prune
from lit_prune.pruning import ADMM, Method, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.search import behind_pruned
from lit_prune.search.behind_pruned import Observation
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from tests.conftest import lively_model

RATES = [0.25, 0.5, 0.75]
METHODS: list[Method] = [
    SparseGPT(),
    Wanda(propagate="pruned"),
    ADMM(),
    MLPWidth(multiple=4, rounds=2),
    HeadGroups(rounds=1),
]
CPU = torch.device("cpu")


@pytest.fixture
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(1, 64, (2, 48), generator=generator)} for _ in range(3)]


def four_groups() -> PreTrainedModel:
    return lively_model("llama", num_attention_heads=4, num_key_value_heads=4)


def plan_of(rates: Sequence[float], path: Path) -> Plan:
    path.write_text("".join(f"{index}: {rate}\n" for index, rate in enumerate(rates)), encoding="utf-8")
    return Plan(str(path))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_trial_of_the_first_rates_has_the_loss_of_the_cut(
    method: Method, batches: list[Batch], tmp_path: Path
) -> None:
    model, cut = four_groups(), four_groups()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = find_blocks(model)

    def stream() -> Stream:
        return Stream(model, blocks, batches, CPU)

    with evaluating(model):
        statistics = method.trial_statistics(model, blocks, rates=RATES, statistics=[], device=CPU, stream=stream)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        with method.trial(model, blocks, statistics=statistics, device=CPU, batches=batches) as trial:
            losses = [trial.loss(RATES, window) for window in range(6)]
    prune(cut, batches, Recipe(method, sum(RATES) / 3, plan_of(RATES, tmp_path / "plan.yaml")))
    expected = measure(cut, batches, "").perplexity
    assert torch.tensor(losses).mean().exp().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("method", "passes"), [(MLPWidth(multiple=4), 2), (Shrink([MLPWidth(), HeadGroups()]), 3)])
def test_the_attention_before_an_mlp_is_computed_once(method: Method, passes: int, batches: list[Batch]) -> None:
    """For the MLP, besides the dense pass and that which observes the attention."""
    model = four_groups()
    blocks, counts = find_blocks(model), [0] * 3
    for block in blocks:
        block.linears["self_attn.q_proj"].module.register_forward_hook(
            lambda *_, index=block.index: counts.__setitem__(index, counts[index] + 1)
        )
    with evaluating(model):
        given = Stream(model, blocks, batches, CPU)
        counts[:] = [0] * 3
        method.trial_statistics(model, blocks, rates=RATES, statistics=[], device=CPU, stream=given.copy)
    assert counts[1] == passes * len(batches)


def test_a_cut_by_the_unpruned_model_keeps_its_statistics(batches: list[Batch]) -> None:
    def stream() -> Stream:
        raise AssertionError("no pass is needed")

    model = four_groups()
    for method in (SparseGPT(propagate="dense"), Wanda()):
        blocks = find_blocks(model)
        assert method.trial_statistics(model, blocks, rates=RATES, statistics=[], device=CPU, stream=stream) == []


def test_an_error_gives_the_weights_back(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    model = four_groups()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = find_blocks(model)
    stream = Stream(model, blocks, batches, CPU)

    def cut(block: object, statistics: object) -> dict[str, Tensor]:
        return {name: torch.full_like(linear.weight_OI, torch.nan) for name, linear in blocks[0].linears.items()}

    def observed(stream: Stream, block: Block, targets: object) -> BlockStatistics:
        return observe(stream, block, frozenset(), advance=False)

    with pytest.raises(Exception, match="NaN"):
        behind_pruned.statistics_behind_pruned(blocks, [Observation(observed, cut)], stream=stream, device=CPU)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
