import json

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.families import find_blocks
from lit_prune.pipeline import Recipe, prune
from lit_prune.recover import LoRA, Recovery, adapter_config, rebuild, snapshot
from tests.conftest import small_model

LEAVES = [leaf for leaf in Recovery.__subclasses__() if leaf.__module__.startswith("lit_prune.")]


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_training_lowers_the_loss_and_keeps_every_zero(
    leaf: type[Recovery], family: str, batches: list[torch.Tensor]
) -> None:
    model = small_model(family)
    prune(model, batches, Recipe(sparsity=0.5))
    pruned = {id(linear.parameter) for block in find_blocks(model) for linear in block.linears.values()}
    gone = {name: tensor == 0 for name, tensor in model.named_parameters() if id(tensor) in pruned}
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


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_lora_leaves_fused_experts_and_linears_of_their_names_alone(family: str) -> None:
    model = small_model(family)
    LoRA().attach(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 4 * 2
    assert all(".self_attn." in name for name in trained)


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj", "experts"])
def test_lora_on_fused_experts_is_refused(target: str) -> None:
    told = (
        rf"`LoRA.target_modules` must match .* got '{target}'; there are k_proj, o_proj, q_proj, v_proj; fused experts"
    )
    with pytest.raises(InputError, match=told):
        LoRA(target_modules=[target]).check(small_model("qwen3_moe"))


def test_lora_takes_the_matrices_of_gpt2() -> None:
    LoRA(target_modules=["c_attn"]).check(small_model("gpt2"))
    with pytest.raises(InputError, match="there are c_attn, c_fc, c_proj, lm_head"):
        LoRA(target_modules=["q_proj"]).check(small_model("gpt2"))


def test_lora_changes_nothing_before_it_is_trained(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    before = model(batches[0]).logits
    LoRA().attach(model)
    torch.testing.assert_close(model(batches[0]).logits, before)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ["q_proj", "up_proj"]), ("llama", None), ("gpt2", None), ("mixtral", None), ("qwen3_moe", ["q_proj"])],
)
def test_snapshot_rebuilds_what_the_weights_need(
    family: str, targets: list[str] | None, batches: list[torch.Tensor]
) -> None:
    model = small_model(family)
    prune(model, batches, Recipe())
    LoRA(r=3, alpha=5, dropout=0.1, target_modules=targets).attach(model)
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    fresh = small_model(family)
    stored = json.loads(json.dumps(snapshot(model)))
    rebuild(fresh, stored)
    rebuild(fresh, stored)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(batches[0]).logits, model.eval()(batches[0]).logits)
    assert snapshot(fresh) == stored
    assert adapter_config(small_model(family)) is None


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
