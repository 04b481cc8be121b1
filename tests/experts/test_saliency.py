"""The saliency of experts."""

import pytest
import torch
from torch import Tensor

from lit_prune.calibration.stream import Stream
from lit_prune.experts.mixture import mixture_of
from lit_prune.experts.saliency import saliency, salient_experts
from lit_prune.models.families import find_blocks
from tests.experts.models import mixture_model


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_the_formula_token_by_token(batches: list[Tensor], *, padded: bool) -> None:
    model = mixture_model("mixtral")
    blocks = find_blocks(model)
    mask = torch.ones_like(batches[0])
    mask[1, 5:] = 0 if padded else 1
    stream = Stream(model, blocks, [{"input_ids": ids, "attention_mask": mask} for ids in batches], torch.device("cpu"))
    mlp = blocks[0].module.mlp
    norms: dict[int, list[float]] = {expert: [] for expert in range(6)}

    def collect(experts: torch.nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        for place, (x, chosen, weights) in enumerate(zip(*args, strict=True)):
            for expert, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
                gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
                y = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                if mask.flatten()[place]:
                    norms[expert].append(weight * float(y.norm()))

    hook = mlp.experts.register_forward_pre_hook(collect)
    for index in range(len(batches)):
        stream.output(index, blocks[0])
    hook.remove()
    mixture = mixture_of(blocks[0].module, model.config, 0)
    assert mixture is not None
    expected = [sum(each) / max(1, len(each)) for each in norms.values()]
    assert saliency(stream, blocks[0], mixture).tolist() == pytest.approx(expected, rel=1e-5)
    assert sum(map(len, norms.values())) == 3 * 2 * (21 if padded else 32)


def test_the_most_salient() -> None:
    found = torch.tensor([3.0, 2.0, 0.0, 1.0])
    assert salient_experts(found, 2) == [0, 1]
    assert salient_experts(found, 2, groups=2) == [0, 3]
    assert salient_experts(torch.zeros(4), 3) == [0, 1, 2]
