"""Reconstruction from end to end: targets, held-out windows, and the pipeline."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.calibration.stream import Stream
from lit_prune.errors import InputError
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import Pruned, prune
from lit_prune.pruning import ADMM, NofM, SparseGPT, Wanda
from lit_prune.pruning.base import Method
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct, reconstruction
from lit_prune.reconstruct.reconstruction import Reconstruction, _divided
from lit_prune.recover.quantise import quantise
from lit_prune.shrink import HeadGroups, MLPWidth
from lit_prune.slice import Slicing
from tests.conftest import lively_model
from tests.shrink.given import Given

WINDOWS = list(torch.randint(1, 64, (24, 48), generator=torch.Generator().manual_seed(3)).split(1))


def reconstructed(
    method: Method, settings: Reconstruct | None, family: str = "llama"
) -> tuple[PreTrainedModel, Pruned]:
    model = lively_model(family)
    return model, prune(model, WINDOWS, Recipe(method, 0.5, Uniform(), reconstruction=settings))


def error(model: PreTrainedModel) -> float:
    """The mean squared distance of the last hidden states from those of the dense model."""
    dense = lively_model(model.config.model_type)
    with torch.no_grad():
        parts = [model.base_model(x)[0] - dense.base_model(x)[0] for x in WINDOWS]
    return float(torch.cat(parts).square().mean())


METHODS = [
    Wanda(),
    SparseGPT(),
    ADMM(),
    Wanda(NofM(2, 4)),
    Wanda(propagate="pruned"),
    MLPWidth(multiple=8),
    HeadGroups(),
]


CASES = [(method, "dense") for method in METHODS] + [(Wanda(), "pruned"), (SparseGPT(), "pruned")]


@pytest.mark.parametrize(("method", "targets_from"), CASES, ids=repr)
def test_blocks_come_closer_to_the_dense_ones(method: Method, targets_from: str) -> None:
    plain, _ = reconstructed(method, None)
    settings = Reconstruct(epochs=3, targets_from=targets_from)  # type: ignore[arg-type]
    model, pruned = reconstructed(method, settings)
    assert pruned.sparsity == pytest.approx(0.5, abs=1e-3)
    # on these few tokens, methods that refit the weights leave less to learn
    assert error(model) < (0.9 if method.keeps_values else 1) * error(plain)
    assert len(pruned.reconstruction) == 3
    for losses in pruned.reconstruction:
        assert losses.kept == (losses.held_out_after < losses.held_out_before)
        assert not losses.kept or losses.train_after < losses.train_before
    assert any(losses.kept for losses in pruned.reconstruction)


def test_the_masks_are_those_of_the_first_block_and_the_same_twice() -> None:
    plain, _ = reconstructed(Wanda(), None)
    model, first = reconstructed(Wanda(), Reconstruct())
    again, second = reconstructed(Wanda(), Reconstruct())
    for name, weight in plain.named_parameters():
        if "proj" in name:  # `propagate` is dense: a reconstruction changes no mask
            assert torch.equal(weight == 0, model.get_parameter(name) == 0)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))
    assert first.reconstruction == second.reconstruction


@pytest.mark.parametrize("lr", [1e30, 30.0])
def test_a_block_that_gets_worse_keeps_the_weights_of_the_cut(lr: float, capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = reconstructed(Wanda(), None)
    model, pruned = reconstructed(Wanda(), Reconstruct(epochs=1, lr=lr))
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), model.parameters(), strict=True))
    for losses in pruned.reconstruction:
        assert not losses.kept
        assert losses.train_after == losses.train_before
        assert math.isnan(losses.held_out_after) or losses.held_out_after > losses.held_out_before
    assert "Block 0 keeps the weights of the cut: its loss on held-out windows went from" in capsys.readouterr().err


def test_a_block_that_gets_worse_is_trained_with_smaller_rates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second training begins from the weights of the cut, as if it had been the only one."""
    model, smaller = reconstructed(Wanda(), Reconstruct(epochs=1, lr=30.0 / 16384))
    assert all(losses.kept for losses in smaller.reconstruction)
    monkeypatch.setattr(reconstruction, "LR_SHARES", (1, 1 / 16384))
    again, pruned = reconstructed(Wanda(), Reconstruct(epochs=1, lr=30.0))
    assert pruned.reconstruction == smaller.reconstruction
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))
    assert "keeps the weights of the cut" not in capsys.readouterr().err


def test_the_learning_rates_that_are_tried() -> None:
    """A rate 16 times too large is right at the third of them; block 1 is better already at the second."""
    _, right = reconstructed(Wanda(), Reconstruct(epochs=1, lr=30.0 / 16384))
    _, large = reconstructed(Wanda(), Reconstruct(epochs=1, lr=30.0 / 1024))
    assert large.reconstruction[0] == right.reconstruction[0]
    assert large.reconstruction[1] != right.reconstruction[1]
    assert all(losses.kept for losses in large.reconstruction)


def test_a_block_of_which_nothing_is_left_keeps_its_zeros(capsys: pytest.CaptureFixture[str]) -> None:
    model = lively_model("llama")
    recipe = Recipe(Wanda(), 1 / 3, Given((1.0, 0.0, 0.0)), max_rate=1.0, reconstruction=Reconstruct(epochs=1))
    first, *others = prune(model, WINDOWS, recipe).reconstruction
    assert not any(linear.weight_OI.any() for linear in find_blocks(model)[0].linears.values())
    norm = lively_model("llama").model.layers[0].input_layernorm.weight
    assert torch.equal(model.model.layers[0].input_layernorm.weight, norm)  # it had no gradient
    assert (first.kept, first.held_out_after) == (False, first.held_out_before)
    assert all(losses.kept for losses in others)  # they make up for it
    assert "Block 0 keeps the weights of the cut" in capsys.readouterr().err


def test_parameters_that_a_training_leaves_frozen_are_reconstructed_all_the_same() -> None:
    free, _ = reconstructed(Wanda(), Reconstruct(epochs=1))
    frozen = lively_model("llama").requires_grad_(False)
    recipe = Recipe(Wanda(), 0.5, Uniform(), reconstruction=Reconstruct(epochs=1))
    prune(frozen, WINDOWS, recipe)
    assert all(torch.equal(*pair) for pair in zip(free.parameters(), frozen.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_targets_are_the_outputs_of_the_dense_block_for_either_stream() -> None:
    model = lively_model("llama")
    blocks, given = find_blocks(model), [{"input_ids": window} for window in WINDOWS]
    with torch.no_grad():
        hidden = model(WINDOWS[0], output_hidden_states=True).hidden_states

    def targets(settings: Reconstruct) -> tuple[Tensor, Reconstruction]:
        run = Reconstruction(settings, Stream(model, blocks, given, torch.device("cpu")))
        run.stream.hidden = [x + 1 for x in run.stream.hidden]  # as behind blocks that are pruned
        return run._targets(blocks[0])[0], run

    from_dense, _ = targets(Reconstruct(targets_from="dense"))
    assert torch.equal(from_dense, hidden[1])
    from_pruned, run = targets(Reconstruct(targets_from="pruned"))
    with torch.no_grad():
        assert torch.equal(from_pruned, run.stream.output(0, blocks[0]))
    assert not torch.equal(from_pruned, from_dense)


@pytest.mark.parametrize(
    ("batches", "training", "held_out"),
    [(2, [0], [1]), (8, [0, 1, 2, 3, 4, 5, 6], [7]), (16, list(range(14)), [14, 15])],
)
def test_the_last_eighth_is_held_out(batches: int, training: list[int], held_out: list[int]) -> None:
    assert _divided(batches) == (training, held_out)


def test_a_single_batch_is_refused() -> None:
    with pytest.raises(InputError, match="`pruning.reconstruction` must have at least two calibration batches"):
        prune(lively_model("llama"), WINDOWS[:1], Recipe(reconstruction=Reconstruct()))


def test_a_quantised_model_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    model = lively_model("llama", hidden_size=64)
    quantise(model, "nf4", double_quant=False)
    recipe = Recipe(Wanda(), 0.5, reconstruction=Reconstruct(state=str(tmp_path / "state")))
    with pytest.raises(InputError, match="`model` must be pruned in full precision, .* is quantised"):
        prune(model, WINDOWS, recipe)
    assert not (tmp_path / "state").exists()


def test_slicing_is_refused() -> None:
    with pytest.raises(InputError, match="`pruning.reconstruction` must be null for Slicing"):
        Recipe(Slicing(), 0.25, Uniform(), reconstruction=Reconstruct())
