"""Zeros that any optimizer leaves alone."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude, NofM, Wanda
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, Snapshot, gradient_masks, restore_gradient_masks
from tests.conftest import small_model

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda given: torch.optim.AdamW(given, lr=1e-2, weight_decay=0.1),
    "AdamW, amsgrad": lambda given: torch.optim.AdamW(given, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "SGD": lambda given: torch.optim.SGD(given, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda given: torch.optim.RMSprop(given, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda given: torch.optim.Adafactor(given, lr=1e-2),
}


def pruned(family: str = "llama", recipe: Recipe | None = None) -> PreTrainedModel:
    model = small_model(family)
    prune(model, [torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(1))], recipe or Recipe())
    FullFineTuning().attach(model)
    return model


def zero_weights(model: PreTrainedModel) -> dict[torch.nn.Parameter, torch.Tensor]:
    linears = [linear for block in find_blocks(model) for linear in block.linears.values()]
    return {linear.parameter: linear.parameter == 0 for linear in linears}  # type: ignore[misc]


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int = 5, accumulated: int = 1) -> None:
    ids = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimizer.zero_grad()
        for part in ids.chunk(accumulated):
            (model(part, labels=part, use_cache=False).loss / accumulated).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_and_moments_stay_zero_under_any_optimizer(name: str) -> None:
    model = pruned()
    gone, before = zero_weights(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    for parameter, zero in gone.items():
        assert torch.equal(parameter == 0, zero)
        for state in optimizer.state[parameter].values():
            if isinstance(state, torch.Tensor) and state.shape == parameter.shape:
                assert (state[zero] == 0).all()
                assert (state[~zero] != 0).any()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "phi", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_linear_with_accumulation_in_either_precision(family: str, dtype: torch.dtype) -> None:
    model = pruned(family).to(dtype)  # type: ignore[arg-type]  # converted after the hooks were put on
    gone = zero_weights(model)
    assert all(zero.any() for zero in gone.values())
    train(model, OPTIMIZERS["AdamW"](model.parameters()), accumulated=2)
    assert all((parameter[zero] == 0).all() for parameter, zero in gone.items())


def test_autocast() -> None:
    model = pruned()
    gone = zero_weights(model)
    with torch.autocast("cpu", torch.bfloat16):
        train(model, OPTIMIZERS["AdamW"](model.parameters()))
    assert all(torch.equal(parameter == 0, zero) for parameter, zero in gone.items())


def test_a_pattern_stays() -> None:
    model = pruned(recipe=Recipe(Wanda(pattern=NofM(2, 4)), 0.5, Uniform()))
    train(model, OPTIMIZERS["AdamW"](model.parameters()))
    assert all(((w != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all() for w in zero_weights(model))


def test_a_gradient_that_is_not_finite_does_not_fill_a_zero() -> None:
    model = pruned()
    weight = model.model.layers[0].mlp.up_proj.weight
    (weight * torch.inf).sum().backward()
    assert (weight.grad[weight == 0] == 0).all()
    assert weight.grad[weight != 0].isinf().all()


def test_a_kept_weight_that_passes_zero_is_no_pruned_one() -> None:
    model = pruned()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.sum().backward()
    row, column = (int(index[0]) for index in torch.where(weight != 0))
    weight.data[row, column] = 0
    weight.grad = None
    weight.sum().backward()
    assert weight.grad[row, column] == 1


def test_linears_of_an_earlier_cut_and_ignored_ones_keep_their_zeros() -> None:
    model = small_model()
    ids = torch.randint(1, 64, (2, 16))
    prune(model, [ids], Recipe(Magnitude(), 0.5, Uniform(), targets=["q_proj"]))
    prune(model, [ids], Recipe(Magnitude(), 0.5, Uniform(), targets=["up_proj"]))
    FullFineTuning().attach(model)
    gone = zero_weights(model)
    assert sum(int(zero.sum()) for zero in gone.values()) == 3 * (32 * 32 + 48 * 32) // 2
    train(model, OPTIMIZERS["AdamW"](model.parameters()))
    assert all(torch.equal(parameter == 0, zero) for parameter, zero in gone.items())


def test_what_is_zero_elsewhere_is_trained() -> None:
    model = pruned("gpt2")
    bias = model.transformer.h[0].attn.c_attn.bias
    assert (bias == 0).all()
    train(model, OPTIMIZERS["AdamW"](model.parameters()))
    assert (bias != 0).all()


def test_a_rebuilt_model_takes_the_zeros_of_the_weights_that_load_after_it() -> None:
    model, fresh = pruned(), small_model()
    stored = Snapshot.of(model)
    stored.rebuild(fresh)
    stored.rebuild(fresh)
    assert all(len(parameter._backward_hooks) == 1 for parameter in zero_weights(fresh))
    fresh.load_state_dict(model.state_dict())
    gone = zero_weights(fresh)
    train(fresh, OPTIMIZERS["AdamW"](fresh.parameters()))
    assert all(torch.equal(parameter == 0, zero) for parameter, zero in gone.items())
    assert not Snapshot.of(small_model()).freezes_zeros


def test_a_later_cut_is_held_once_attached_again() -> None:
    model = pruned(recipe=Recipe(sparsity=0.3))
    train(model, OPTIMIZERS["AdamW"](model.parameters()))
    prune(model, [torch.randint(1, 64, (2, 16))], Recipe(sparsity=0.6))
    FullFineTuning().attach(model)
    gone = zero_weights(model)
    train(model, OPTIMIZERS["AdamW"](model.parameters()))
    assert all(torch.equal(parameter == 0, zero) for parameter, zero in gone.items())


def test_a_run_that_goes_on_holds_the_same_zeros(batches: list[torch.Tensor]) -> None:
    models = [small_model(), small_model()]
    for model in models:
        model.model.layers[0].mlp.up_proj.weight.data[:, 1] = 0
        FullFineTuning().attach(model)
    first, resumed = models
    assert gradient_masks(first) == {}  # no gradient has come
    first(batches[0], labels=batches[0]).loss.backward()
    weight = "model.layers.0.mlp.up_proj.weight"
    for model in models:
        model.get_parameter(weight).data[3, 5] = 0  # a kept weight that passes zero
    restore_gradient_masks(resumed, gradient_masks(first))
    resumed(batches[0], labels=batches[0]).loss.backward()
    grad = resumed.get_parameter(weight).grad
    assert grad is not None
    assert grad[3, 5] != 0
    assert (grad[:, 1] == 0).all()
