"""MLPs that take over what removed blocks added, against least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.stream import Stream
from lit_prune.depth.refit import check_refit, refit, transformation
from lit_prune.errors import InputError
from lit_prune.models.families import find_blocks
from tests.conftest import blocks_of, lively_model, small_model
from tests.depth.skipping import skipping


def test_transformation_by_hand() -> None:
    gram_DD, cross_DD = torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    expected = torch.tensor([[1.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(transformation(gram_DD, cross_DD, 1e-9), expected)
    # a = 2 * mean(4, 0) = 4: half of what it would be without
    half = torch.tensor([[1.25, 0.25], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(transformation(gram_DD, cross_DD, 2.0), half)
    assert gram_DD.tolist() == [[4, 0], [0, 0]]


def outputs_of(model: PreTrainedModel, batches: list[Tensor], module: str) -> Tensor:
    """The outputs of a module of the model, (tokens, D)."""
    seen: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(lambda _m, _a, y: seen.append(y.flatten(0, -2).double()))
    for batch in batches:
        model(batch, use_cache=False)
    hook.remove()
    return torch.cat(seen)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "layers", "mlp", "writer"),
    [("llama", "model.layers", "mlp", "mlp.down_proj"), ("gpt2", "transformer.h", "mlp", "mlp.c_proj")],
)
def test_the_mlp_before_a_gap_is_the_least_squares_fit(
    family: str, layers: str, mlp: str, writer: str, batches: list[Tensor]
) -> None:
    model, dense = lively_model(family), lively_model(family)
    blocks = find_blocks(model)
    refit(model, blocks, [[1, 2]], _stream(model, batches), damping=1e-6)
    m_PD = outputs_of(dense, batches, f"{layers}.0.{mlp}")
    start_PD, end_PD = (outputs_of(dense, batches, f"{layers}.{number}") for number in (0, 2))
    matrix_DD = torch.linalg.lstsq(m_PD, end_PD + m_PD - start_PD).solution
    now_PD = outputs_of(model, batches, f"{layers}.0.{mlp}")
    assert (now_PD - m_PD @ matrix_DD).norm() < 0.01 * (now_PD - m_PD).norm()
    changed = [
        name
        for (name, one), other in zip(model.named_parameters(), dense.parameters(), strict=True)
        if not torch.equal(one, other)
    ]
    assert changed == [
        f"{layers}.0.{writer}.{kind}" for kind in ("weight", "bias") if family == "gpt2" or kind == "weight"
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "phi", "falcon"])
def test_the_stream_behind_the_gaps_is_closer_to_the_dense_one(family: str, batches: list[Tensor]) -> None:
    fields = {"num_hidden_layers": 6}
    model, dense = lively_model(family, **fields), lively_model(family, **fields)
    refit(model, find_blocks(model), [[1], [4]], _stream(model, batches), damping=0.01)
    end = f"{find_blocks(model)[4].path}"
    with skipping(dense, set()):
        target_PD = outputs_of_block(dense, batches, end)
    errors = []
    for one in (dense, model):
        with skipping(one, {1, 4}):
            errors.append(float((outputs_of_block(one, batches, end, skipped=True) - target_PD).norm()))
    assert errors[1] < 0.8 * errors[0]


def outputs_of_block(model: PreTrainedModel, batches: list[Tensor], path: str, *, skipped: bool = False) -> Tensor:
    """The stream behind a block, which for a skipped one is the stream in front of it."""
    seen: list[Tensor] = []

    def see(_module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        x_BTD = args[0] if skipped else output[0] if isinstance(output, tuple) else output
        seen.append(x_BTD.flatten(0, -2).double())

    hook = model.get_submodule(path).register_forward_hook(see)
    for batch in batches:
        model(batch, use_cache=False)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "what their MLP writes is not added to the residual stream as it is"),
        ("olmo2", "what their MLP writes is not added to the residual stream as it is"),
        ("mixtral", "its MLPs are mixtures of experts"),
    ],
)
def test_families_that_cannot_be_refitted(family: str, reason: str) -> None:
    model = small_model(family)
    with pytest.raises(InputError, match=f"`Depth.refit` must be false for the family '{family}': {reason}"):
        check_refit(model, find_blocks(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_that_can(dtype: torch.dtype) -> None:
    for family in ("llama", "falcon", "gpt_neox", "opt", "granite"):
        model = small_model(family).to(dtype)  # type: ignore[arg-type]
        check_refit(model, find_blocks(model))
        check_refit(model.to("meta"), find_blocks(model))  # type: ignore[arg-type]
        assert list(blocks_of(model))


def _stream(model: PreTrainedModel, batches: list[Tensor]) -> Stream:
    return Stream(model, find_blocks(model), [{"input_ids": batch} for batch in batches], model.device)
