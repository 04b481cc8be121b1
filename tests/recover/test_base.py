"""Contract of every recovery; a new one is tested without being named."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.errors import InputError
from lit_prune.models.families import find_blocks
from lit_prune.models.linears import has_fused_experts
from lit_prune.models.quantised import compute_exactly, mask
from lit_prune.pipeline import prune
from lit_prune.pruning import NofM, Wanda
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, MaskedLoRA, Recovery, Snapshot
from lit_prune.recover.merge import without_adapter
from tests.conftest import WIDE, export, small_model

LEAVES = [leaf for leaf in Recovery.__subclasses__() if leaf.__module__.startswith("lit_prune.")]
ADAPTERS: list[type[LoRA] | type[MaskedLoRA]] = [LoRA, MaskedLoRA]


def zero_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Where the linears of the blocks are pruned, by name: where they are zero, or by their mask if they have one."""
    blocks = find_blocks(without_adapter(model), quantised=True)
    linears = {f"{block.index}.{name}": linear for block in blocks for name, linear in block.linears.items()}
    masks = {name: mask(linear.module) for name, linear in linears.items()}
    return {name: ~kept if (kept := masks[name]) is not None else linears[name].weight_OI == 0 for name in linears}


def trained(model: PreTrainedModel, batch: torch.Tensor, accumulated: int = 1, steps: int = 20) -> list[float]:
    """The losses of some steps of AdamW with weight decay and clipping."""
    given = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(given, lr=1e-2, weight_decay=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        for part in batch.chunk(accumulated):
            loss = model(part, labels=part).loss
            (loss / accumulated).backward()
        torch.nn.utils.clip_grad_norm_(given, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_and_keeps_every_zero_to_the_reopened_folder(
    leaf: type[Recovery], family: str, dtype: torch.dtype, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model = small_model(family, **(WIDE if leaf.quantises else {})).to(dtype)  # type: ignore[arg-type]
    if leaf.quantises and has_fused_experts(model.modules()):
        with pytest.raises(InputError, match=f"must not be {leaf.__name__} for a mixture of fused experts"):
            leaf().check(model)
        return
    leaf().check(model)
    prune(model, batches, Recipe(sparsity=0.5))
    gone = zero_weights(model)
    leaf().attach(model)
    assert any(parameter.requires_grad for parameter in model.parameters())
    losses = trained(model, batches[0])
    assert losses[-1] < losses[0]
    export(model, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    compute_exactly(opened)
    for name, zero in zero_weights(opened).items():
        assert zero[gone[name]].all()
        assert zero[~gone[name]].float().mean() < (0.25 if leaf.quantises else 1e-3)  # which rounds small ones to zero
    if dtype == torch.float32:
        torch.testing.assert_close(opened(batches[0]).logits, model.eval()(batches[0]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leaf", LEAVES)
def test_accumulated_gradients_keep_a_pattern(leaf: type[Recovery], batches: list[torch.Tensor]) -> None:
    model = small_model()
    prune(model, batches, Recipe(Wanda(pattern=NofM(2, 4)), 0.5, Uniform()))
    leaf().attach(model)
    trained(model, torch.cat(batches), accumulated=3, steps=3)
    for zero in zero_weights(model).values():
        assert (zero.unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_rebuilt_model_is_trained_as_the_first_was(leaf: type[Recovery], batches: list[torch.Tensor]) -> None:
    found = []
    for rebuilt in (False, True):
        model = small_model()
        prune(model, batches, Recipe(sparsity=0.5))
        torch.manual_seed(0)
        leaf().attach(model)
        trained(model, batches[0], steps=2)
        if rebuilt:
            stored, weights = json.loads(json.dumps(Snapshot.of(model).to_dict())), model.state_dict()
            model = small_model()
            Snapshot.from_dict(stored).rebuild(model)
            model.load_state_dict(weights, strict=True)
        trained(model, batches[0], steps=3)
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if not leaf.quantises])
def test_nothing_changes_before_it_is_trained(
    leaf: type[Recovery], model: PreTrainedModel, batches: list[torch.Tensor]
) -> None:
    before = model(batches[0]).logits
    leaf().attach(model)
    torch.testing.assert_close(model(batches[0]).logits, before)
