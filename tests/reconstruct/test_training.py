"""The training of one block: which weights move, in which type, in which order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_prune.calibration.stream import Stream
from lit_prune.models.families import Block, find_blocks
from lit_prune.reconstruct import Reconstruct
from lit_prune.reconstruct.training import BlockTraining
from tests.conftest import lively_model

BATCHES = [{"input_ids": torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(n))} for n in range(4)]


def training(
    family: str = "llama", settings: Reconstruct | None = None, dtype: torch.dtype = torch.float32
) -> tuple[BlockTraining, Block]:
    """The training of a first block, half of whose weights are 0, towards its dense output."""
    model = lively_model(family).to(dtype)
    blocks = find_blocks(model)
    stream = Stream(model, blocks, BATCHES, torch.device("cpu"))
    with torch.no_grad():
        targets = [stream.output(index, blocks[0]) for index in range(len(BATCHES))]
        for linear in blocks[0].linears.values():
            linear.write(linear.weight_OI.masked_fill(linear.weight_OI.abs() < linear.weight_OI.abs().median(), 0))
    return BlockTraining(settings or Reconstruct(epochs=2), stream, blocks[0], targets), blocks[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "mixtral"])
def test_zeros_stay_zero_and_every_other_parameter_moves(family: str) -> None:
    run, block = training(family)
    before = {name: parameter.detach().clone() for name, parameter in block.module.named_parameters()}
    after = run.run(range(4))
    held = {name for name, zeros in run._zeros.items() if zeros.any()}
    assert len(held) >= 2
    for name, weight in before.items():
        if name in held:
            assert torch.equal(after[name] == 0, weight == 0), name
        assert not torch.equal(after[name], weight), name
        assert torch.equal(block.module.get_parameter(name), weight)  # the block itself is not written to


def test_the_weights_keep_their_type_and_are_trained_in_float32() -> None:
    run, block = training(dtype=torch.bfloat16, settings=Reconstruct(epochs=2, lr=1e-5))
    after = run.run(range(4))
    assert {master.dtype for master in run.weights.values()} == {torch.float32}
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    name = "mlp.down_proj.weight"
    assert not torch.equal(run.weights[name], block.module.get_parameter(name).float())  # steps below bfloat16's


def test_an_expert_without_tokens_keeps_its_weights() -> None:
    run, block = training("mixtral", Reconstruct(epochs=2, weight_decay=0.5))
    gate: Tensor = block.module.get_parameter("mlp.gate.weight")
    with torch.no_grad():  # the router never chooses expert 3
        run.weights["mlp.gate.weight"].zero_()
        run.weights["mlp.gate.weight"][0] = 1.0
        gate.zero_()
    run.stream.hidden = [hidden.abs() for hidden in run.stream.hidden]
    after = run.run(range(4))["mlp.experts.down_proj"]
    before = block.module.get_parameter("mlp.experts.down_proj")
    moved = [not torch.equal(after[expert], before[expert]) for expert in range(4)]
    assert moved[0]
    assert not all(moved)


def test_the_order_depends_on_seed_and_block_and_leaves_the_global_state_alone() -> None:
    run, _ = training(settings=Reconstruct(epochs=3))
    state = torch.get_rng_state()
    order = list(run._order(range(4), 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert order == list(run._order(range(4), 5))
    assert [sorted(order[start : start + 4]) for start in (0, 5, 10)] == [[0, 1, 2, 3]] * 3  # type: ignore[type-var]
    assert order[4::5] == [None] * 3  # another process has one batch more
    others = [training(settings=Reconstruct(epochs=3, seed=seed))[0] for seed in (1, 2)]
    assert any(list(other._order(range(4), 5)) != order for other in others)
