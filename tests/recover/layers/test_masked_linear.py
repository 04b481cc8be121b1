"""The masked product: by hand, against the plain expression, and what it keeps in memory."""

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, MaskedLoRA, merged_weight
from lit_prune.recover.layers.masked_linear import MaskedLinear, MaskedProduct, masked_sum, zeroed
from tests.conftest import small_model

W = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, -2.0]])
A = torch.tensor([[1.0, 2.0, 1.0]])
B = torch.tensor([[1.0], [2.0]])


def trained(model: PreTrainedModel, **fields: object) -> PreTrainedModel:
    """``model`` at half its weights, under a masked adapter that does something."""
    prune(model, [torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(1))], Recipe())
    MaskedLoRA(r=3, **fields).attach(model)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=random) * 0.05).to(parameter.dtype)
    return model


def layers(model: PreTrainedModel) -> list[MaskedLinear]:
    return [module for module in model.modules() if isinstance(module, MaskedLinear)]


def naive(x: Tensor, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    return x @ ((weight_OI + scale * b_OR @ a_RI) * (weight_OI != 0)).T


def test_by_hand() -> None:
    # half of B A is [[.5, 1, .5], [1, 2, 1]]
    assert masked_sum(W, A, B, 0.5).tolist() == [[1.5, 0, 2.5], [0, 5, -1]]
    x, a, b = (
        torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True),
        A.clone().requires_grad_(),
        B.clone().requires_grad_(),
    )
    y = MaskedProduct.apply(x, W, a, b, 0.5)
    assert y.tolist() == [[9, 7]]
    y.sum().backward()
    assert x.grad.tolist() == [[1.5, 5, 1.5]]
    # G = [[1, 0, 3], [0, 2, 3]]: dA = half of its first row and twice its second, dB = half of G times (1, 2, 1)
    assert a.grad.tolist() == [[0.5, 2, 4.5]]
    assert b.grad.tolist() == [[2], [3.5]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_zeroed_is_a_positive_zero_whatever_was_there(dtype: torch.dtype, transposed: bool) -> None:
    weight = torch.tensor([[1.0, 0.0, -0.0], [0.0, -3.0, 0.0]], dtype=dtype)
    given = torch.tensor([[1.0, torch.nan, -torch.inf], [-2.0, -5.0, -0.0]], dtype=dtype)
    found = zeroed(given.T.contiguous(), weight.T).T if transposed else zeroed(given.clone(), weight)
    assert found.tolist() == [[1, 0, 0], [0, -5, 0]]
    assert (torch.signbit(found) == torch.tensor([[False, False, False], [False, True, False]])).all()


def test_gradients_are_those_of_the_plain_expression() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 5, 7), "w": (4, 7), "a": (3, 7), "b": (4, 3)}
    x, w, a, b = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes.values())
    w = w.masked_fill(w.abs() < 0.5, 0)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: MaskedProduct.apply(x, w, a, b, 0.7), (x, a, b))
    ours = torch.autograd.grad(MaskedProduct.apply(x, w, a, b, 0.7).square().sum(), (x, a, b))
    theirs = torch.autograd.grad(naive(x, w, a, b, 0.7).square().sum(), (x, a, b))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_weight_that_is_trained_after_all_has_the_masked_gradient() -> None:
    w = W.clone().requires_grad_()
    MaskedProduct.apply(torch.ones(1, 3), w, A, B, 0.5).sum().backward()
    assert w.grad.tolist() == [[1, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(shape, generator=random).to(dtype) for shape in ((64, 96), (16, 96), (64, 16)))
    exact = w.double() + 0.5 * (b.double() @ a.double())
    found = masked_sum(w, a, b, 0.5)
    assert found.dtype == dtype
    assert (found != exact.to(dtype)).float().mean() < 0.01  # ties, by the last bit of the float32 sum


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_a_weights_size_is_saved_but_parameters(family: str, checkpointing: bool) -> None:
    # tokens that are fewer than any weight has rows, so that no activation is as large
    model, ids = (
        trained(small_model(family, hidden_size=48, intermediate_size=96, head_dim=12)),
        torch.ones(1, 4).long(),
    )
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    shapes = {tuple(layer.weight_OI.shape) for layer in layers(model)}
    shapes |= {shape[::-1] for shape in shapes}
    own = {parameter.data_ptr() for parameter in model.parameters()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert saved
    assert not [tensor.shape for tensor in saved if tuple(tensor.shape) in shapes and tensor.data_ptr() not in own]


def test_the_saved_tensors_of_the_plain_expression_would_be_seen() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        naive(torch.ones(1, 3), W, A.clone().requires_grad_(), B.clone().requires_grad_(), 0.5)
    assert [tensor for tensor in saved if tensor.shape == (2, 3) and tensor.data_ptr() != W.data_ptr()]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "mixtral"])
def test_the_layer_gives_what_its_merged_weight_gives(family: str) -> None:
    model, ids = trained(small_model(family)), torch.arange(1, 17)[None]
    expected = model(ids).logits
    zero = [layer.get_base_layer().weight == 0 for layer in layers(model)]
    for layer in layers(model):
        layer.get_base_layer().weight.data = merged_weight(layer)
    model.disable_adapters()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)
    for layer, gone in zip(layers(model), zero, strict=True):
        assert torch.equal(layer.get_base_layer().weight == 0, gone)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pefts_own_merge_keeps_the_zeros(family: str) -> None:
    model, ids = trained(small_model(family)), torch.arange(1, 17)[None]
    expected, before = model(ids).logits, layers(model)[0].get_base_layer().weight.clone()
    for layer in layers(model):
        layer.merge(safe_merge=family == "gpt2")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    weight = layers(model)[0].get_base_layer().weight
    assert torch.equal(weight == 0, before == 0)
    assert not torch.equal(weight, before)
    layers(model)[0].unmerge()
    torch.testing.assert_close(layers(model)[0].get_base_layer().weight, before)


def test_plain_lora_fills_the_zeros(model: PreTrainedModel) -> None:
    prune(model, [torch.arange(1, 17)[None]], Recipe())
    LoRA().attach(model)
    for layer in (module for module in model.modules() if isinstance(module, Linear)):
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        assert (merged_weight(layer) == 0).sum() < 3


def test_autocast_computes_in_half_precision_and_adds_in_full() -> None:
    model, ids = trained(small_model()), torch.arange(1, 17)[None]
    layer = layers(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 32)).dtype == torch.bfloat16
        loss = model(ids, labels=ids).loss
        loss.backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.nn.functional.linear(torch.ones(1, 32), layer.merged_weight())
        torch.testing.assert_close(layer(torch.ones(1, 32)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    ids, found = torch.arange(1, 17)[None], []
    for checkpointing in (False, True):
        model = trained(small_model(), dropout=0.5).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append([parameter.grad for name, parameter in model.named_parameters() if ".lora_" in name])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_takes_columns_of_a_for_all_positions_at_once() -> None:
    model = trained(small_model(), dropout=0.5).train()
    layer = layers(model)[0]
    layer.get_base_layer().weight.data.fill_(1.0)
    torch.manual_seed(0)
    given = layer(torch.eye(32)).detach()  # row i is column i of W'
    delta = (2 * 16 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T
    dropped = ((given - 1).abs() < 1e-6).all(1)
    assert 5 < dropped.sum() < 27
    torch.testing.assert_close(given[~dropped] - 1, delta[~dropped].detach())
    assert not torch.equal(layer(torch.eye(32)), given)
    torch.testing.assert_close(layer.eval()(torch.eye(32)) - 1, delta / 2)


def test_no_gradient_is_kept_where_only_inference_runs() -> None:
    model = trained(small_model()).eval()
    with torch.no_grad():
        assert model(torch.arange(1, 9)[None]).logits.grad_fn is None
    with torch.inference_mode():
        tokens = model.generate(torch.arange(1, 9)[None], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 11)
