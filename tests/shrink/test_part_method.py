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
from lit_prune.shrink import HeadGroups, MLPWidth, part_method
from lit_prune.shrink.part_method import PartCut, PartMethod, cut_blocks, in_attention
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "phi", "gemma2", "mixtral"])
def test_the_attention_runs_once_while_the_mlp_is_cut(
    family: str, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Experts() if family == "mixtral" else MLPWidth(multiple=1)
    found = {}
    for remembers in (True, False):
        model, calls = lively_model(family), [0]
        blocks = find_blocks(model)
        stream = Stream(model, blocks, [{"input_ids": batch} for batch in batches], CPU)
        cut = method.begin(model, blocks, rates=[0.5] * len(blocks), stream=stream)
        name = next(name for name in blocks[1].linears if in_attention(name))
        blocks[1].module.get_submodule(name).register_forward_hook(lambda *_, calls=calls: _count(calls))
        if not remembers:
            monkeypatch.setattr(part_method, "attention_of", lambda _block: [])
        cut_blocks(model, blocks, [cut], stream=stream, device=CPU, reconstruction=None)
        cut.finish()
        found[remembers] = dict(model.named_parameters()), calls[0]
    (weights, calls_once), (expected, calls_always) = found[True], found[False]
    assert calls_always - calls_once == len(batches)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], msg=name)


def test_an_attention_that_is_cut_is_not_remembered(batches: list[Tensor]) -> None:
    model = lively_model("llama")
    blocks = find_blocks(model)
    stream = Stream(model, blocks, [{"input_ids": batch} for batch in batches], CPU)
    rates = [0.5] * len(blocks)
    cuts = [part.begin(model, blocks, rates=rates, stream=stream) for part in (HeadGroups(), MLPWidth(multiple=1))]
    assert [cut.behind_attention for cut in cuts] == [False, True]
    cut_blocks(model, blocks, cuts, stream=stream, device=CPU, reconstruction=None)
    for cut in cuts:
        cut.finish()
    hidden = model(batches[0], output_hidden_states=True).hidden_states
    torch.testing.assert_close(stream.hidden[0], hidden[len(blocks) - 1])  # in front of the last block


def _count(calls: list[int]) -> None:
    calls[0] += 1


def test_what_is_a_part_and_where_it_is() -> None:
    assert {kind: kind.place for kind in (HeadGroups, MLPWidth, Experts)} == {HeadGroups: 0, MLPWidth: 1, Experts: 1}
    assert all(issubclass(kind, PartMethod) and kind.can_be_part for kind in (HeadGroups, MLPWidth, Experts))
