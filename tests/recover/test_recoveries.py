import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.pipeline import Recipe, prune
from lit_prune.recover import LoRA, Recovery, adapter_config, rebuild, snapshot
from tests.conftest import small_model

LEAVES = [leaf for leaf in Recovery.__subclasses__() if leaf.__module__.startswith("lit_prune.")]


@pytest.mark.parametrize("leaf", LEAVES)
def test_training_lowers_the_loss_and_keeps_every_zero(leaf: type[Recovery], batches: list[torch.Tensor]) -> None:
    model = small_model()
    prune(model, batches, Recipe(sparsity=0.5))
    gone = {name: tensor == 0 for name, tensor in model.state_dict().items() if "_proj" in name}
    leaf().attach(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(20):
        loss = model(batches[0], labels=batches[0]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all((after[name][where] == 0).all() for name, where in gone.items())


def test_lora_trains_the_adapter_alone(model: PreTrainedModel) -> None:
    LoRA(r=4, target_modules=["q_proj"]).attach(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name and "q_proj" in name for name in trained)
    assert len(trained) == 6


def test_lora_changes_nothing_before_it_is_trained(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    before = model(batches[0]).logits
    LoRA().attach(model)
    torch.testing.assert_close(model(batches[0]).logits, before)


def test_snapshot_rebuilds_what_the_weights_need(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    prune(model, batches, Recipe())
    LoRA(r=3, alpha=5, dropout=0.1, target_modules=["q_proj", "up_proj"]).attach(model)
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    fresh = small_model()
    stored = snapshot(model)
    rebuild(fresh, stored)
    rebuild(fresh, stored)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(batches[0]).logits, model.eval()(batches[0]).logits)
    assert snapshot(fresh) == stored
    assert adapter_config(small_model()) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"r": 0}, "`LoRA.r` must be at least 1"), ({"dropout": 1.0}, r"`LoRA.dropout` must be in \[0, 1\)")],
)
def test_settings_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRA(**fields)  # type: ignore[arg-type]


def test_target_modules_that_match_nothing(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=r"`LoRA.target_modules` must match .*, got 'none'; there are .*q_proj"):
        LoRA(target_modules=["q_proj", "none"]).check(model)
    LoRA(target_modules=["q_proj"]).check(model)
