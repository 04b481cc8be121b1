"""Sharded weights in a process group of one: what is gathered, held and begun. Two processes: tests/callbacks."""

import copy
import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from lit_prune.allocate import Allocation, LayerRedundancy, Uniform
from lit_prune.errors import InputError
from lit_prune.fit.fsdp import gathered, initialise_states, is_sharded, shard
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import (
    FullFineTuning,
    LoRA,
    MaskedLoRA,
    Snapshot,
    freeze_zeros,
    gradient_masks,
    restore_gradient_masks,
)
from lit_prune.shrink import MLPWidth
from lit_prune.slice import Slicing
from tests.conftest import small_model
from tests.masks.test_freeze import train, zero_weights

IDS = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def pruned(family: str = "llama", recipe: Recipe | None = None) -> PreTrainedModel:
    model = small_model(family)
    prune(model, [IDS], recipe or Recipe())
    return model


def check_gathered(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Asks whether what is gathered of ``model``, sharded, is ``model`` itself."""
    alone = copy.deepcopy(model)
    shard(model, mesh)
    assert is_sharded(model)
    whole = gathered(model)
    assert whole is not None
    assert not is_sharded(whole)
    assert Snapshot.of(whole) == Snapshot.of(alone)
    state, expected = whole.state_dict(), alone.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    torch.testing.assert_close(whole(IDS).logits, alone(IDS).logits)
    torch.testing.assert_close(model(IDS).logits, alone(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_family_is_gathered_as_it_was(mesh: DeviceMesh, family: str) -> None:
    check_gathered(small_model(family), mesh)


@pytest.mark.parametrize("recovery", [LoRA(), MaskedLoRA()])
def test_masks_and_adapters_are_gathered(mesh: DeviceMesh, recovery: LoRA | MaskedLoRA) -> None:
    model = pruned()
    recovery.attach(model)
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0), steps=1)
    check_gathered(model, mesh)


def test_slices_are_gathered(mesh: DeviceMesh) -> None:
    check_gathered(pruned(recipe=Recipe(Slicing(), 0.25)), mesh)


@pytest.mark.parametrize("allocation", [Uniform(), LayerRedundancy(base=0.1)])
def test_shrunk_models_are_gathered(mesh: DeviceMesh, allocation: Allocation) -> None:
    check_gathered(pruned(recipe=Recipe(MLPWidth(multiple=8), 0.5, allocation)), mesh)


def test_a_whole_model_is_itself() -> None:
    model = small_model()
    assert gathered(model) is model
    assert not is_sharded(model)


def test_an_unknown_family_is_refused(mesh: DeviceMesh) -> None:
    model = small_model()
    model.config.model_type = "strange"
    model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="`pruning.blocks` must be given for the family 'strange'"):
        shard(model, mesh)


def test_zeros_of_shards_stay_zero_and_training_is_that_of_a_whole_model(mesh: DeviceMesh) -> None:
    alone, model = pruned(), pruned()
    FullFineTuning().attach(alone)
    zeros = list(zero_weights(alone).values())
    shard(model, mesh)
    freeze_zeros(model)
    for trained in (alone, model):
        train(trained, torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.1), accumulated=2)
    whole = gathered(model)
    assert whole is not None
    found = list(zero_weights(whole).values())
    assert all(bool(now[gone].all()) for now, gone in zip(found, zeros, strict=True))
    for one, other in zip(whole.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_masks_of_shards_are_stored_whole_and_taken_up(mesh: DeviceMesh) -> None:
    model = pruned()
    zeros = [gone.sum() for gone in zero_weights(model).values()]
    shard(model, mesh)
    freeze_zeros(model)
    assert gradient_masks(model) == {}  # no gradient has come
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    masks = gradient_masks(model)
    assert len(masks) == len(zeros)
    assert all(isinstance(bits, torch.Tensor) and type(bits) is torch.Tensor for bits in masks.values())
    name = next(iter(masks))
    masks[name] = torch.zeros_like(masks[name])  # holds nothing
    restore_gradient_masks(model, masks)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    assert torch.equal(gradient_masks(model)[name], masks[name])
    whole = gathered(model)
    assert whole is not None
    assert int((whole.get_parameter(name) == 0).sum()) < zeros[0]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_states_that_are_read_before_the_first_step_change_nothing(mesh: DeviceMesh, kind: type) -> None:
    models = [small_model(), small_model()]
    for model, asked in zip(models, (False, True), strict=True):
        shard(model, mesh)
        optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1)
        if asked:
            initialise_states(model, optimizer)
            get_optimizer_state_dict(model, optimizer)  # as a checkpoint does
        train(model, optimizer, steps=2)
    one, other = (list(model.parameters()) for model in models)
    assert all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in zip(one, other, strict=True))  # type: ignore[attr-defined]
