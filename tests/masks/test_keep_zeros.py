"""Zeros that stay in training outside lit_prune: transformers' Trainer, a loop of torch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel, Trainer, TrainingArguments

from lit_prune import InputError, Magnitude, Recipe, Uniform, keep_zeros, prune
from lit_prune.masks.zeros import zero_shares
from tests.conftest import small_model

IDS = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(2))


def pruned(family: str = "llama") -> PreTrainedModel:
    model = small_model(family)
    prune(model, [IDS], Recipe(Magnitude(), 0.5, Uniform()))
    return model


def sparsity(model: PreTrainedModel) -> float:
    return zero_shares(model)[1]


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()


def train_by_trainer(model: PreTrainedModel, folder: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()  # type: ignore[arg-type]


def test_three_steps_of_the_trainer_of_transformers_fill_no_zero(tmp_path: Path) -> None:
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sparsity(model) == 0.5
    keep_zeros(model)
    train_by_trainer(model, tmp_path)
    assert sparsity(model) == 0.5
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_it_they_fill_all(tmp_path: Path) -> None:
    model = pruned()
    train_by_trainer(model, tmp_path)
    assert sparsity(model) == 0


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_loop_of_torch_trains_any_kind_of_linear(family: str) -> None:
    model = pruned(family)
    keep_zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        step(model, optimizer)
    assert sparsity(model) == 0.5


def test_momentum_from_before_the_call_fills_no_zero() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    step(model, optimizer)
    prune(model, [IDS], Recipe(Magnitude(), 0.5, Uniform()))
    keep_zeros(model)
    step(model, optimizer)
    assert sparsity(model) == 0.5


def test_an_optimizer_that_mixes_gradients_fills_no_zero() -> None:
    model = pruned()
    keep_zeros(model)
    linears = [weight for name, weight in model.named_parameters() if "proj" in name]
    optimizer = torch.optim.Muon(linears, lr=1e-2)
    step(model, optimizer)
    assert sparsity(model) == 0.5


def test_zeros_are_trained_once_the_handle_is_removed() -> None:
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with keep_zeros(model):
        step(model, optimizer)
    assert sparsity(model) == 0.5
    step(model, optimizer)
    assert sparsity(model) < 0.01


def frozen() -> PreTrainedModel:
    return pruned().requires_grad_(False)


def adapted() -> PreTrainedModel:
    model = pruned()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


REFUSED: list[tuple[Callable[[], object], str]] = [
    (small_model, "`model` must have zeros in the linears of its blocks, got none"),
    (frozen, "`model` must have blocks that are trained, got none"),
    (adapted, "`model` must have no adapter, got one"),
    (lambda: torch.nn.Linear(2, 3), "`model` must be a Hugging Face model, got Linear"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_has_no_zeros_to_keep_is_refused(make: Callable[[], PreTrainedModel], message: str) -> None:
    with pytest.raises(InputError, match=message):
        keep_zeros(make())
