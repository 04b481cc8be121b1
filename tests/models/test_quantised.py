"""Linears in 4 and 8 bits: zeros, masks, bytes, and what goes in and out of a state dict."""

import io
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.pytorch_utils import Conv1D

from lit_prune.models.load import load_model
from lit_prune.models.quantised import (
    Linear4bit,
    check_zeros,
    dense,
    dequantised,
    device_map,
    is_quantised,
    mask,
    packed_bytes,
    pruned,
    quantised,
    sharing_weight,
)
from lit_prune.recover.merge import record_quantisation
from lit_prune.recover.quantise import quantise
from tests.conftest import WIDE, small_model

TYPES: list[Any] = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]
SHAPES = [(64, 128), (33, 35), (7, 5), (200, 3)]  # of which 64 weights to a scale divide the first alone
types = pytest.mark.parametrize(("quantization", "double_quant"), TYPES)


def linear(shape: tuple[int, int] = (64, 128), dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    """Half of its weights zero, and all of its second row."""
    random = torch.Generator().manual_seed(0)
    module = nn.Linear(shape[1], shape[0], bias)
    weight = torch.randn(shape, generator=random)
    weight[torch.rand(shape, generator=random) < 0.5] = 0
    weight[1] = 0
    module.weight.data = weight
    return module.to(dtype).requires_grad_(False)


@types
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_and_the_mask_tells_them_from_those_of_rounding(
    shape: tuple[int, int], dtype: torch.dtype, quantization: Any, double_quant: bool
) -> None:
    given = linear(shape, dtype)
    before, gone = given.weight.clone(), given.weight == 0
    packed = quantised(given, quantization, double_quant, masked=True)
    assert torch.equal(given.weight, before)
    weight = dequantised(packed)
    assert weight.dtype == dtype
    assert weight.shape == shape
    assert (weight[gone] == 0).all()
    assert torch.equal(mask(packed), ~gone)
    assert pruned(packed) == int(gone.sum())
    if shape == SHAPES[0]:
        assert int((weight == 0).sum()) > int(gone.sum())
    worst = {"nf4": 0.16, "fp4": 0.17, "int8": 0.01}[quantization]  # half of the widest gap of the type
    assert (weight - before).abs().max() <= worst * before.abs().max()


@types
def test_it_multiplies_by_what_its_bits_give_in_training_or_not(quantization: Any, double_quant: bool) -> None:
    packed = quantised(linear(), quantization, double_quant, masked=True)
    stored = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    expected = x @ dequantised(packed).T + packed.bias
    for training in (True, False):
        with torch.no_grad():
            given = packed.train(training)(x)
        close = {"rtol": 0, "atol": 0.3} if quantization == "int8" and not training else {}  # int8 activations
        torch.testing.assert_close(given, expected, **close)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in packed.state_dict().items())


def test_a_weight_that_is_on_a_gpu_already_is_quantised_too(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = quantised(linear(), "int8", False, masked=True)
    # on a GPU, Int8Params moves such a weight as it is: it quantises only what comes from the CPU
    monkeypatch.setattr(bnb.nn.Int8Params, "to", lambda weight, *_args, **_kwargs: weight)
    packed = quantised(linear(), "int8", False, masked=True)
    assert packed.weight.dtype == torch.int8
    assert torch.equal(dequantised(packed), dequantised(expected))
    assert packed.state_dict().keys() == expected.state_dict().keys()


def test_a_quantised_model_is_loaded_onto_the_device_that_is_asked_for() -> None:
    config: Any = LlamaConfig()
    assert device_map(config, "cpu") == {}
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert device_map(config, "cpu") == {"device_map": {"": "cpu"}}
    config.quantization_config = {"quant_method": "gptq"}
    assert device_map(config, "cpu") == {}


@types
@pytest.mark.parametrize("used", [False, True])
def test_a_state_dict_survives_a_file_and_another_module(quantization: Any, double_quant: bool, used: bool) -> None:
    packed = quantised(linear(), quantization, double_quant, masked=True)
    if used:
        packed(torch.ones(1, 128))
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    other = linear()
    other.weight.data = other.weight * 2 + 1
    fresh = quantised(other, quantization, double_quant, masked=True)
    assert not torch.equal(dequantised(fresh), dequantised(packed))
    fresh.load_state_dict(stored, strict=True)
    assert torch.equal(dequantised(fresh), dequantised(packed))
    assert torch.equal(mask(fresh), mask(packed))
    x = torch.ones(2, 128)
    assert torch.equal(fresh(x), packed(x))


@types
def test_bytes(quantization: Any, double_quant: bool) -> None:
    size, scales = 64 * 128, 64 * 128 // 64
    found = packed_bytes(quantised(linear(), quantization, double_quant, masked=True))
    if quantization == "int8":
        assert found == size + 64 * 4 + 1  # a scale a row, and the format
        return
    tables, told = 16 * 4, found - size // 2
    if double_quant:  # a byte a scale, and a table of 256 and a scale for 256 of them
        assert 0 < told - tables - scales - 256 * 4 - 4 < 250  # numbers as text
    else:
        assert 0 < told - tables - scales * 4 < 150


def test_a_conv1d_is_turned_and_turned_back() -> None:
    given = Conv1D(64, 128)
    given.weight.data = linear().weight.data.T.contiguous()
    packed = quantised(given, "nf4", True, masked=True)
    assert torch.equal(dequantised(packed), dequantised(quantised(linear(), "nf4", True, masked=True)))
    back = dense(packed, dequantised(packed))
    assert isinstance(back, Conv1D)
    x = torch.randn(3, 128)
    torch.testing.assert_close(back(x), packed(x))


@types
def test_a_shell_shares_the_weight_and_has_no_mask_in_its_state_dict(quantization: Any, double_quant: bool) -> None:
    packed: Any = quantised(linear(), quantization, double_quant, masked=True)
    other: Any = sharing_weight(packed)
    assert other.weight.data_ptr() == packed.weight.data_ptr()
    assert packed.state_dict().keys() - other.state_dict().keys() == {"mask_bits"}
    assert torch.equal(dequantised(other), dequantised(packed))
    assert pruned(other) == pruned(packed)


def test_a_zero_that_is_filled_is_an_error() -> None:
    packed = quantised(linear(), "nf4", True, masked=True)
    weight = dequantised(packed)
    check_zeros(weight, packed, "whole")
    weight[1, 3] = 1e-30
    with pytest.raises(RuntimeError, match="weights that were pruned are not zero in the broken weight"):
        check_zeros(weight, packed, "broken")
    check_zeros(weight, quantised(linear(), "nf4", True, masked=False), "of no mask")


def test_quantising_checks_the_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_prune.models.quantised.dequantised", lambda module: torch.ones(64, 128))
    with pytest.raises(RuntimeError, match="not zero in the quantised weight"):
        quantised(linear(), "fp4", False, masked=True)


def test_what_is_quantised() -> None:
    assert not is_quantised(linear())
    assert is_quantised(bnb.nn.Linear4bit(2, 2))
    assert is_quantised(quantised(linear(), "int8", False, masked=False))


def test_a_cast_of_what_it_is_in_leaves_it_alone() -> None:
    model: Any = nn.Sequential(
        quantised(linear(), "nf4", True, masked=True), quantised(linear(), "int8", False, masked=True)
    )
    before: list[Tensor] = [dequantised(module) for module in model]
    model.to(torch.bfloat16)
    assert all(torch.equal(dequantised(module), one) for module, one in zip(model, before, strict=True))
    assert isinstance(model[0], Linear4bit)


def test_the_rest_of_a_quantised_folder_is_converted_too(tmp_path: Path) -> None:
    model = small_model(**WIDE).to(torch.bfloat16)  # type: ignore[arg-type]
    quantise(model, "nf4", True)
    record_quantisation(model)
    model.save_pretrained(tmp_path)
    opened = load_model(str(tmp_path), "float32")
    stored = load_model(str(tmp_path)).state_dict()
    assert opened.dtype == torch.float32
    assert {tensor.dtype for name, tensor in opened.state_dict().items() if "norm" in name} == {torch.float32}
    packed = [name for name, tensor in stored.items() if tensor.dtype == torch.uint8]
    assert packed
    assert all(torch.equal(opened.state_dict()[name], stored[name]) for name in packed)
