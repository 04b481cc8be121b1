"""MLPWidth against the formula, on a block of a model."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lit_prune.allocate import Uniform
from lit_prune.calibration.stream import Stream
from lit_prune.calibration.windows import Batch
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.shrink import MLPWidth
from lit_prune.shrink.units.parts import mlp_of
from tests.calibration.plain_forward import hidden_by_block
from tests.conftest import inputs_by_linear, lively_model
from tests.shrink.given import Given


@torch.no_grad()
def test_the_channels_and_the_weights_of_the_first_block(batches: list[Tensor]) -> None:
    dense, model = lively_model("llama"), lively_model("llama")
    inputs = inputs_by_linear(dense, find_blocks(dense)[0], batches)
    x_PI = inputs["mlp.down_proj"].double()
    weight_IO = dense.model.layers[0].mlp.down_proj.weight.double().T
    gram_II = x_PI.T @ x_PI / len(x_PI)
    gram_II += 0.01 * gram_II.diagonal().mean() * torch.eye(48)
    prune(model, batches, Recipe(MLPWidth(multiple=1, rounds=1, damping=0.01), 12 / 144, Given((0.25, 0, 0))))
    cost_I = weight_IO.square().sum(1) / torch.linalg.inv(gram_II).diagonal()
    kept = cost_I.argsort()[12:].sort().values
    mlp, before = model.model.layers[0].mlp, dense.model.layers[0].mlp
    assert torch.equal(mlp.gate_proj.weight, before.gate_proj.weight[kept])
    assert torch.equal(mlp.up_proj.weight, before.up_proj.weight[kept])
    expected_SO = torch.linalg.solve(gram_II[kept][:, kept], (gram_II @ weight_IO)[kept])
    torch.testing.assert_close(mlp.down_proj.weight.double(), expected_SO.T, rtol=1e-4, atol=1e-5)
    assert [mlp.intermediate_size, mlp.down_proj.in_features, mlp.up_proj.out_features] == [36, 36, 36]


@torch.no_grad()
def test_the_second_block_sees_the_first_one_shrunk(batches: list[Tensor]) -> None:
    model = lively_model("llama")
    prune(model, batches, Recipe(MLPWidth(multiple=8), 0.5, Given((0.75, 0.25, 0.5))))
    alone = lively_model("llama")
    prune(alone, batches, Recipe(MLPWidth(multiple=8), 0.25 / 3 + 1e-3, Given((0, 0.25, 0))))
    one, other = (shrunk.model.layers[1].mlp.down_proj.weight for shrunk in (model, alone))
    assert one.shape == other.shape
    assert not torch.allclose(one, other)


@torch.no_grad()
def test_the_second_block_makes_up_for_the_first() -> None:
    """Its output is closer to that of the dense block; the first block has nothing to make up for."""
    batches = list(torch.randint(1, 64, (8, 4, 64), generator=torch.Generator().manual_seed(0)))
    dense, plain, model = (lively_model("llama") for _ in range(3))
    given = Recipe(MLPWidth(multiple=1, rounds=1, correct_errors=False), 0.25, Given((0.5, 0.25, 0)))
    prune(plain, batches, given)
    prune(model, batches, replace(given, method=MLPWidth(multiple=1, rounds=1)))
    torch.testing.assert_close(*(each.model.layers[0].mlp.down_proj.weight for each in (plain, model)))
    errors = [0.0, 0.0]
    for batch in batches:
        target_BTD, *outputs = (hidden_by_block(each, {"input_ids": batch})[1][1] for each in (dense, plain, model))
        for index, y_BTD in enumerate(outputs):
            errors[index] += float((y_BTD - target_BTD).square().sum())
    assert errors[1] < 0.98 * errors[0], errors


def test_families_that_normalise_the_output_are_not_corrected(
    batches: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [lively_model("gemma2") for _ in range(2)]
    for model, correct_errors in zip(models, (True, False), strict=True):
        prune(model, batches, Recipe(MLPWidth(multiple=8, correct_errors=correct_errors), 0.5, Uniform()))
    assert "does not make up for the errors of the blocks before" in capsys.readouterr().err
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without and with biases
def test_one_calibration_batch_is_not_enough_to_correct(
    family: str, batches: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [lively_model(family) for _ in range(2)]
    for model, correct_errors in zip(models, (True, False), strict=True):
        prune(model, batches[:1], Recipe(MLPWidth(multiple=8, correct_errors=correct_errors), 0.5, Uniform()))
    assert capsys.readouterr().err.count("that takes at least two calibration batches, lower `pruning.calibr") == 1
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("own", "others", "corrects"), [(2, 1, True), (1, 1, True), (2, 0, False)])
def test_all_processes_correct_or_none(
    own: int, others: int, corrects: bool, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this process finds is that of one of two; the other has a batch and finds the same, or not."""
    model = lively_model("llama")
    blocks = find_blocks(model)
    stream = Stream(model, blocks, [{"input_ids": ids} for ids in batches[:own]], model.device)
    writer = mlp_of(blocks[0].linears, model.config)
    monkeypatch.setattr("lit_prune.shrink.base.distributed.all_reduce_count", lambda count: count + others)
    monkeypatch.setattr("lit_prune.shrink.base.distributed.world_size", lambda: 2)
    assert MLPWidth(multiple=8)._compares(blocks[0], writer, stream) is corrects


def test_too_few_calibration_tokens_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 channels take 192 tokens; padding is none, and those of other processes count."""

    def told(method: MLPWidth, tokens: int, sparsity: float = 0.25) -> bool:
        monkeypatch.setattr("lit_prune.progress._told", set())
        mask_NT = (torch.arange(64) < tokens).long().repeat(4, 1)
        padded: list[Batch] = [{"input_ids": torch.arange(256).view(4, 64) % 63 + 1, "attention_mask": mask_NT}]
        prune(lively_model("llama"), padded, Recipe(method, sparsity))
        line = f"MLPWidth compensates by {4 * tokens} calibration tokens for the 48 inputs of mlp.down_proj, fewer than"
        return line in capsys.readouterr().err

    assert told(MLPWidth(multiple=8), 47)
    assert not told(MLPWidth(multiple=8), 48)
    assert not told(MLPWidth(multiple=8, compensate=False), 47)
    assert not told(MLPWidth(multiple=8), 47, sparsity=0.0)
    monkeypatch.setattr("lit_prune.calibration.stream.distributed.all_reduce_count", lambda count: 2 * count)
    assert not told(MLPWidth(multiple=8), 47)
