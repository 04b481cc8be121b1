"""The mask cache: weights of every level, each computed once, and a model that is dense again at the end."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream, observe
from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import measure
from lit_prune.masks.zeros import zeros
from lit_prune.models.families import Block, find_blocks
from lit_prune.models.linears import DenseLinear
from lit_prune.pruning import ADMM, Magnitude, MaskMethod, MixedNofM, SparseGPT, Wanda
from lit_prune.pruning.mask_method import groups_of
from lit_prune.search import mask_cache
from tests.conftest import small_model

METHODS = [Magnitude(), Wanda(), SparseGPT(), ADMM(), Wanda(MixedNofM(8))]
RATES = [0.25, 0.75, 0.5]
NOTHING = [BlockStatistics()] * 3


@pytest.fixture
def dicts(batches: list[torch.Tensor]) -> list[Batch]:
    return [{"input_ids": batch} for batch in batches]


def statistics(model: PreTrainedModel, dicts: list[Batch], method: MaskMethod) -> list[BlockStatistics]:
    blocks = find_blocks(model)
    stream = Stream(model, blocks, dicts, model.device)
    return [observe(stream, block, method.needs) for block in blocks]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def cut_block(method: MaskMethod, block: Block, statistics: BlockStatistics, rate: float) -> None:
    for group in groups_of(block, statistics, dict.fromkeys(block.linears, rate)):
        group.write(method.prune(group.weights, group.statistics, rate))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_trial_is_the_cut_and_leaves_the_model_alone(family: str, method: MaskMethod, dicts: list[Batch]) -> None:
    model, cut = small_model(family), small_model(family)
    before, blocks, observed = weights(model), find_blocks(model), statistics(model, dicts, method)
    for block, rate in zip(find_blocks(cut), RATES, strict=True):
        cut_block(method, block, observed[block.index], rate)
    dense = measure(model, dicts, "x").perplexity
    with method.trial(model, blocks, statistics=observed, device=model.device, batches=dicts) as trial:
        trial.take([0.5, 0.5, 0.75])
        losses = [trial.loss(RATES, window) for window in range(6)]
        assert same(model, weights(cut))
    assert same(model, before)
    expected = measure(cut, dicts, "x").perplexity
    assert math.exp(sum(losses) / 6) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(dense, rel=1e-5)


def test_half_precision_and_zeros_that_were_there(dicts: list[Batch]) -> None:
    model = small_model().to(torch.bfloat16)
    for block in find_blocks(model):
        cut_block(Magnitude(), block, BlockStatistics(), 0.3)
    before, blocks, method = weights(model), find_blocks(model), SparseGPT()
    observed = statistics(model, dicts, method)
    with method.trial(model, blocks, statistics=observed, device=model.device, batches=dicts) as trial:
        trial.take([0.6] * 3)
        zero, total = zeros(linear.weight_OI for block in blocks for linear in block.linears.values())
        assert zero / total == pytest.approx(0.6, abs=1e-3)
        assert all((tensor[before[name] == 0] == 0).all() for name, tensor in model.state_dict().items())
    assert same(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_model_alone(error: type[BaseException], dicts: list[Batch]) -> None:
    model = small_model()
    before, blocks = weights(model), find_blocks(model)

    def fail() -> None:
        with Magnitude().trial(model, blocks, statistics=NOTHING, device=model.device, batches=dicts) as trial:
            trial.take(RATES)
            assert not same(model, before)
            raise error

    with pytest.raises(error):
        fail()
    assert same(model, before)


def test_an_interrupt_in_the_middle_of_a_swap_leaves_the_model_alone(
    dicts: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    before, blocks = weights(model), find_blocks(model)
    last = blocks[1].linears[max(blocks[1].linears)]  # files give them in the order of their names
    own = DenseLinear.write

    def write(linear: DenseLinear, weight_OI: torch.Tensor) -> None:
        if linear == last:
            monkeypatch.setattr(DenseLinear, "write", own)
            raise KeyboardInterrupt
        own(linear, weight_OI)

    def interrupted() -> None:
        with Magnitude().trial(model, blocks, statistics=NOTHING, device=model.device, batches=dicts) as trial:
            monkeypatch.setattr(DenseLinear, "write", write)
            trial.take(RATES)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert same(model, before)


def test_a_level_is_computed_once_and_a_block_that_has_it_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, made = find_blocks(small_model()), []

    def cut(block: Block, rates: Mapping[str, float]) -> mask_cache.Weights:
        assert block.linears.keys() == rates.keys()
        made.extend((block.index, name, rate) for name, rate in rates.items())
        return {name: torch.where(w.weight_OI > 0, w.weight_OI, 0) for name, w in block.linears.items()}

    def rates(*by_block: float) -> list[dict[str, float]]:
        return [dict.fromkeys(blocks[0].linears, rate) for rate in by_block]

    cache = mask_cache.MaskCache(blocks, cut, tmp_path)
    cache.take(rates(0.5, 0.5, 0.5))
    assert made == [(block.index, name, 0.5) for block in blocks for name in block.linears]
    made.clear()
    one = rates(0.5, 0.5, 0.5)
    one[2]["self_attn.v_proj"] = 0.75
    one[0]["mlp.up_proj"] = 0.0  # dense, which is not computed
    cache.take(one)
    assert made == [(2, "self_attn.v_proj", 0.75)]
    assert blocks[0].linears["mlp.up_proj"].pruned == 0 < blocks[0].linears["mlp.gate_proj"].pruned
    cache.take(rates(0.5, 0.5, 0.5))
    assert made == [(2, "self_attn.v_proj", 0.75)]
    monkeypatch.setattr(DenseLinear, "write", lambda *_: pytest.fail("a linear was written"))
    cache.take(rates(0.5, 0.5, 0.5))


def test_a_level_of_a_mask_takes_a_bit_a_weight(tmp_path: Path) -> None:
    block = find_blocks(small_model())[0]
    dense = {name: linear.weight_OI.clone() for name, linear in block.linears.items()}
    scale = {"by": 1.0}

    def cut(block: Block, rates: Mapping[str, float]) -> mask_cache.Weights:
        return {name: torch.where(weight_OI > 0, weight_OI * scale["by"], 0) for name, weight_OI in dense.items()}

    cache = mask_cache.MaskCache([block], cut, tmp_path)
    before = set(tmp_path.iterdir())
    cache.take([dict.fromkeys(dense, 0.5)])
    first = set(tmp_path.iterdir()) - before
    scale["by"] = 2.0
    cache.take([dict.fromkeys(dense, 0.6)])
    masks, changed = sum(map(held, first)), sum(map(held, set(tmp_path.iterdir()) - before - first))
    assert masks == pytest.approx(block.size / 8, rel=0.01)
    assert changed == pytest.approx(block.size / 8 + 4 * block.size / 2, rel=0.05)
    assert all(torch.equal(block.linears[name].weight_OI, cut(block, {})[name]) for name in dense)


def held(file: Path) -> int:
    return sum(tensor.nbytes for tensor in mask_cache.load_file(file).values())


def test_the_folder_is_removed_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with mask_cache.mask_cache(find_blocks(small_model()), lambda block, rates: {}) as cache:
        assert cache.folder.parent == tmp_path
        assert len(list(cache.folder.iterdir())) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_trial_by_linear_has_the_rates_of_the_blocks_until_they_are_changed(dicts: list[Batch]) -> None:
    model, cut = small_model(), small_model()
    block, name = find_blocks(cut)[1], "mlp.down_proj"
    for other, rate in zip(find_blocks(cut), RATES, strict=True):
        cut_block(Magnitude(), other, BlockStatistics(), rate)
    expected = weights(cut)
    before, blocks = weights(model), find_blocks(model)
    with Magnitude().trial(model, blocks, statistics=NOTHING, device=model.device, batches=dicts) as trial:
        linears = trial.by_name()
        assert list(linears.sizes) == [linear.size for block in blocks for linear in block.linears.values()]
        rates = linears.split(RATES)
        linears.take(rates)
        assert same(model, expected)
        by_block = linears.by_block(rates)
        assert by_block[1] == dict.fromkeys(block.linears, 0.75)
        rates[list(block.linears).index(name) + 7] = 0.25
        linears.take(rates)
        assert [block.linears[name].pruned / block.linears[name].size for block in blocks] == [0.25, 0.25, 0.5]
        assert blocks[1].linears["mlp.up_proj"].pruned / blocks[1].linears["mlp.up_proj"].size == 0.75
        assert linears.tokens == trial.tokens
    assert same(model, before)
