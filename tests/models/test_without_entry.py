"""Families without an entry in ``families.FAMILIES``: masks and adapters need nothing but the model."""

import copy

import pytest
import torch

from lit_prune.calibration.stream import Stream
from lit_prune.models.families import FAMILIES, blocks_path, find_blocks
from lit_prune.models.linears import watching
from lit_prune.models.load import skeleton
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, MaskedLoRA, Recovery
from lit_prune.recover.merge import merged
from tests.conftest import WITHOUT_ENTRY, lively_model, small_model

ROUTERS = ("mlp.gate.weight", "router.weight", "shared_expert_gate.weight")
MIXTURES = [name for name in WITHOUT_ENTRY if "experts" in str(WITHOUT_ENTRY[name])]
IDS = torch.randint(1, 64, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", WITHOUT_ENTRY)
def test_masks_and_adapters(family: str) -> None:
    model = lively_model(family)
    assert family not in FAMILIES
    assert blocks_path(skeleton(model.config)) == blocks_path(model)  # before weights are read
    blocks = find_blocks(model)
    stream = Stream(model, blocks, [{"input_ids": IDS}], torch.device("cpu"))
    outputs: list[torch.Tensor] = []
    hook = blocks[-1].module.register_forward_hook(lambda *given: outputs.append(given[-1]))
    with torch.no_grad():
        model(IDS, use_cache=False)
    hook.remove()
    for block in blocks:
        stream.run(block)
    expected = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(stream.hidden[0], expected, rtol=1e-4, atol=1e-4)
    pruned = prune(model, [IDS], Recipe(sparsity=0.5))
    assert pruned.sparsity == pytest.approx(0.5, abs=1e-3)
    leaves: tuple[Recovery, ...] = (LoRA(), MaskedLoRA())
    for leaf in leaves:
        adapted = copy.deepcopy(model)
        leaf.check(adapted)
        leaf.attach(adapted)
        adapted(IDS[:1], labels=IDS[:1], use_cache=False).loss.backward()
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        assert sum(bool(p.grad is not None and p.grad.any()) for p in trained.values()) >= len(blocks)
        if isinstance(leaf, MaskedLoRA):
            for name, parameter in trained.items():
                parameter.data += 0.01 * (".lora_B." in name)
            adapted = merged(adapted)
            assert any(not torch.equal(p, dict(model.named_parameters())[n]) for n, p in adapted.named_parameters())
            assert [block.pruned for block in find_blocks(adapted)] == [block.pruned for block in blocks]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", *MIXTURES])
def test_routers_are_left_alone(family: str) -> None:
    model = small_model(family)
    routers = {name: p.clone() for name, p in model.named_parameters() if name.endswith(ROUTERS)}
    assert any(not name.endswith("shared_expert_gate.weight") for name in routers)
    assert len([name for name in routers if "shared" in name]) == (
        3 if "shared_expert_int" in str(WITHOUT_ENTRY.get(family)) else 0
    )
    prune(model, [IDS], Recipe(sparsity=0.5))
    after = dict(model.named_parameters())
    assert all(torch.equal(before, after[name]) for name, before in routers.items())
    LoRA().check(model)
    LoRA().attach(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("router" in name or ".gate." in name or "shared_expert_gate" in name for name in trained)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_experts_of_other_layouts_compute_the_same_one_by_one(family: str) -> None:
    model = lively_model(family)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
    seen: dict[str, int] = {}
    block = find_blocks(model)[0]

    def see(name: str, x: torch.Tensor, _rows: object) -> None:
        seen[name] = x.shape[0]
        assert x.shape[-1] == block.linears[name].weight_OI.shape[1]

    with torch.no_grad(), watching(block.linears.values(), see):
        torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    routed = [rows for name, rows in seen.items() if name.endswith("gate_up_proj")]
    assert sum(routed) == IDS.numel() * model.config.num_experts_per_tok
