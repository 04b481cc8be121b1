"""A pass that starts at the first changed block has the logits of a whole one."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_prune.allocate import Search, Uniform
from lit_prune.allocate.base import Level
from lit_prune.allocate.search import Loss
from lit_prune.pipeline import score
from lit_prune.pruning import Method, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.search import prefix
from lit_prune.search.losses import MeasuredLosses
from lit_prune.search.prefix import Prefix
from lit_prune.search.space import Point
from lit_prune.search.trial import Trial
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from lit_prune.slice import Slicing
from tests.conftest import lively_model


class Counted:
    """Blocks that count their calls; they keep doing so while their forward is replaced by that of a prefix."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.run: list[int] = []
        for index, block in enumerate(blocks):
            block.forward = self._counting(index, block.forward)

    def _counting(self, index: int, forward):  # type: ignore[no-untyped-def]
        def counting(*args, **kwargs):  # type: ignore[no-untyped-def]
            self.run.append(index)
            return forward(*args, **kwargs)

        return counting

    def since(self) -> list[int]:
        ran, self.run = self.run, []
        return ran


@torch.no_grad()
def test_only_blocks_from_the_first_changed_one_on_run() -> None:
    blocks = [nn.Linear(4, 4) for _ in range(4)]
    counted, kept = Counted(blocks), Prefix(blocks, most=2)
    inputs = {window: torch.randn(3, 4) for window in range(3)}
    model = nn.Sequential(*blocks)

    def run(window: int, settings: str) -> list[int]:
        with kept.reused(window, settings):
            found = model(inputs[window])
        ran = counted.since()
        assert torch.equal(found, model(inputs[window]))
        counted.since()
        return ran

    assert run(0, "aaaa") == [0, 1, 2, 3]
    blocks[2].weight.data += 1
    assert run(0, "aaba") == [2, 3]
    assert run(0, "aaba") == []
    assert run(1, "aaba") == [0, 1, 2, 3]  # another window
    blocks[1].weight.data += 1
    assert run(0, "abba") == [1, 2, 3]
    assert run(2, "abba") == [0, 1, 2, 3]  # which takes the place of window 1
    assert run(0, "abba") == []
    assert run(1, "abba") == [0, 1, 2, 3]


@torch.no_grad()
def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
    kept, x = Prefix(blocks, most=1), torch.randn(3, 4)
    with pytest.raises(RuntimeError), kept.reused(0, "ab"):
        nn.Sequential(*blocks)(torch.randn(3, 5))
    with kept.reused(0, "ab"):
        found = nn.Sequential(*blocks)(x)
    assert torch.equal(found, blocks[1](blocks[0](x)))
    assert not any(block._forward_hooks or "forward" in block.__dict__ for block in blocks)


@pytest.mark.parametrize(
    ("method", "level", "family"),
    [
        (Wanda(), "blocks", "llama"),
        (SparseGPT(), "linears", "llama"),
        (Wanda(), "blocks", "falcon"),
        (Wanda(), "linears", "mixtral"),
        (MLPWidth(multiple=2), "blocks", "qwen3"),
        (Shrink([MLPWidth(multiple=2), HeadGroups()]), "blocks", "llama"),
        (Shrink([MLPWidth(multiple=2), HeadGroups()]), "parts", "llama"),
        (Slicing(multiple=2), "blocks", "llama"),
        (Slicing(multiple=2, slice_head=True), "blocks", "phi"),
    ],
    ids=str,
)
def test_a_search_measures_the_same_with_fewer_blocks(
    method: Method,
    level: Level,
    family: str,
    batches: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss: Loss = "cross_entropy" if isinstance(method, Slicing) else "kl"

    def losses(name: str) -> dict[tuple[Point, int], float]:
        path = str(tmp_path / name)
        search = Search(Uniform(), evaluations=100, windows=2, level=level, loss=loss, step=0.25, state=path)
        score(lively_model(family), batches, Recipe(method, 0.25, search))
        return MeasuredLosses(path).losses

    skipped: list[Tensor] = []
    returning = prefix._returning
    monkeypatch.setattr(prefix, "_returning", lambda output: skipped.append(output) or returning(output))
    found = losses("reused")
    assert len(found) > 40
    assert len(skipped) > 8
    monkeypatch.setattr(Trial, "reuse", lambda self, windows: None)
    assert losses("whole") == found
