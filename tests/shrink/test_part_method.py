"""Cuts of several parts take their turns in every block."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.calibration.stream import Stream
from lit_prune.experts import Experts
from lit_prune.models.families import Block, find_blocks
from lit_prune.models.remote_code.modeling_shrunk import LayerConfig
from lit_prune.shrink import HeadGroups, MLPWidth
from lit_prune.shrink.part_method import PartCut, PartMethod, cut_blocks
from tests.conftest import lively_model

CPU = torch.device("cpu")


class Noted(PartCut):
    """A cut that changes nothing but a field of the config."""

    def __init__(self, name: str, seen: list[Any], *, compares: bool = False) -> None:
        self.name, self.seen, self.compares = name, seen, compares

    def cut(self, block: Block, config: Any, stream: Stream, targets: Sequence[Tensor] | None) -> LayerConfig | None:
        fields = tuple(name for name in ("first", "second") if hasattr(config, name))
        output_BTD = None if targets is None else targets[0].clone()
        self.seen.append((block.index, self.name, fields, stream.hidden[0].clone(), output_BTD))
        if self.compares:
            block.linears["mlp.down_proj"].module.weight.data.zero_()  # type: ignore[operator, union-attr]
        return LayerConfig(config, {self.name: 1})

    def finish(self) -> list[float]:
        return []


@torch.no_grad()
@pytest.mark.parametrize("compares", [False, True])
def test_every_block_is_cut_by_all_parts_before_the_next_one(compares: bool, batches: list[Tensor]) -> None:
    model, seen = lively_model("llama"), list[Any]()
    dense = model(batches[0], output_hidden_states=True).hidden_states
    blocks = find_blocks(model)
    stream = Stream(model, blocks, [{"input_ids": batch} for batch in batches], CPU)
    cuts = [Noted("first", seen, compares=compares), Noted("second", seen)]
    cut_blocks(model, blocks, cuts, stream=stream, device=CPU, reconstruction=None)
    assert [(index, name) for index, name, *_ in seen] == [(b, name) for b in range(3) for name in ("first", "second")]
    assert [fields for _, _, fields, *_ in seen] == [(), ("first",)] * 3  # a config has the sizes of the parts before
    for index, name, _, input_BTD, output_BTD in seen:
        assert torch.equal(input_BTD, dense[index]) == (index == 0 or not compares)  # behind blocks that are cut
        assert (output_BTD is not None) == (compares and name == "first")
        if output_BTD is not None and index < 2:  # the last one is behind the norm
            torch.testing.assert_close(output_BTD, dense[index + 1])  # behind dense ones


def test_what_is_a_part_and_where_it_is() -> None:
    assert {kind: kind.place for kind in (HeadGroups, MLPWidth, Experts)} == {HeadGroups: 0, MLPWidth: 1, Experts: 1}
    assert all(issubclass(kind, PartMethod) and kind.can_be_part for kind in (HeadGroups, MLPWidth, Experts))
