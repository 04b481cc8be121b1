"""Snapshots survive JSON, and rebuild a model whose weights are loaded afterwards; a second time changes nothing."""

import json

import pytest
import torch

from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, Snapshot, adapter_config
from lit_prune.recover.layers.masked_linear import MaskedLinear
from tests.conftest import small_model

ADAPTERS: list[type[LoRA] | type[MaskedLoRA]] = [LoRA, MaskedLoRA]


def test_a_snapshot_by_hand(batches: list[torch.Tensor]) -> None:
    model = small_model()
    prune(model, batches, Recipe(sparsity=0.5))
    model.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    FullFineTuning().attach(model)
    stored = Snapshot.of(model).to_dict()
    assert stored["trained"] == ["model.layers.1.mlp.up_proj.weight"]
    assert stored["freezes_zeros"]
    assert stored["adapter"] is stored["quantised"] is None
    assert stored["record"]["recipe"]["sparsity"] == 0.5
    assert Snapshot.from_dict(json.loads(json.dumps({**stored, "epoch": 3}))) == Snapshot.of(model)


def test_a_rebuilt_model_trains_what_the_first_one_trained() -> None:
    model, fresh = small_model(), small_model()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    Snapshot.of(model).rebuild(fresh)
    assert [name for name, parameter in fresh.named_parameters() if parameter.requires_grad] == ["model.norm.weight"]


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
    stored = json.loads(json.dumps(Snapshot.of(model).to_dict()))
    Snapshot.from_dict(stored).rebuild(fresh)
    Snapshot.from_dict(stored).rebuild(fresh)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(batches[0]).logits, model.eval()(batches[0]).logits)
    assert Snapshot.of(fresh).to_dict() == stored
    assert adapter_config(small_model(family)) is None


def test_a_rebuilt_adapter_is_of_the_same_kind() -> None:
    for leaf in ADAPTERS:
        model, fresh = small_model(), small_model()
        leaf(target_modules=["q_proj"]).attach(model)
        Snapshot.of(model).rebuild(fresh)
        assert isinstance(fresh.model.layers[0].self_attn.q_proj, MaskedLinear) is (leaf is MaskedLoRA)
        assert not isinstance(fresh.model.layers[0].self_attn.k_proj, MaskedLinear)
