"""Statistics of blocks against plain forwards, and by hand."""

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_prune.calibration.statistics import COSINE, GRAM, INPUTS, InputGram, InputSquares, Observer
from lit_prune.calibration.stream import Stream, observe
from lit_prune.models.families import find_blocks
from tests.calibration.plain_forward import hidden_by_block
from tests.conftest import inputs_by_linear, small_model

BOTH = frozenset({INPUTS, COSINE})
CPU = torch.device("cpu")


def dicts(batches: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": batch} for batch in batches]


def test_norms_are_root_mean_squares_of_what_each_linear_sees(
    any_model: PreTrainedModel, batches: list[torch.Tensor]
) -> None:
    blocks = find_blocks(any_model)
    observed = observe(Stream(any_model, blocks, dicts(batches), CPU), blocks[0], frozenset({INPUTS, GRAM}))
    assert observed.norms.keys() == observed.grams.keys() == blocks[0].linears.keys()
    for name, x_PI in inputs_by_linear(any_model, blocks[0], batches).items():
        torch.testing.assert_close(observed.norms[name], x_PI.square().mean(0).sqrt())
        torch.testing.assert_close(observed.grams[name], x_PI.T @ x_PI / len(x_PI))


def test_linears_with_one_input_share_one_statistic(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    block = find_blocks(model)[0]
    with Observer(block, BOTH).watching() as observer:
        Stream(model, find_blocks(model), dicts(batches), CPU).run(block, observer)
    observed = observer.statistics()
    assert len({id(norm_I) for norm_I in observed.norms.values()}) == 4
    assert observed.norms.keys() == block.linears.keys()
    assert observed.groups(block.linears) == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_what_is_shared_stays_shared_on_another_device(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    block = find_blocks(model)[0]
    observed = observe(Stream(model, find_blocks(model), dicts(batches), CPU), block, frozenset({GRAM}))
    moved = observed.to(torch.device("meta"))
    assert len({id(gram) for gram in moved.grams.values()}) == 4
    assert all(gram.is_meta for gram in moved.grams.values())
    assert not moved.norms
    assert moved.input_of("mlp.up_proj").gram_II is moved.input_of("mlp.gate_proj").gram_II


@pytest.mark.parametrize(
    ("family", "shared"),
    [
        ("phi", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"]),
        ("falcon", ["self_attention.query_key_value", "mlp.dense_h_to_4h"]),
    ],
)
def test_parallel_blocks_share_across_attention_and_mlp(
    family: str, shared: list[str], batches: list[torch.Tensor]
) -> None:
    model = small_model(family)
    blocks = find_blocks(model)
    observed = observe(Stream(model, blocks, dicts(batches), CPU), blocks[0], BOTH)
    assert sorted(shared) in [sorted(group) for group in observed.groups(blocks[0].linears)]


def test_an_expert_that_no_token_reaches_has_statistics_of_zero() -> None:
    model = small_model("mixtral")
    model.model.layers[0].mlp.gate.weight.data[3] = 0  # one token: two of the other three score above 0
    blocks = find_blocks(model)
    stream = Stream(model, blocks, [{"input_ids": torch.tensor([[5]])}], CPU)
    observed = observe(stream, blocks[0], frozenset({INPUTS, GRAM}))
    reached = {name for name in blocks[0].linears if "experts" in name and observed.norms[name].any()}
    assert len(reached) == 4
    for name in blocks[0].linears.keys() - reached:
        if "experts" in name:
            assert not observed.norms[name].any()
            assert not observed.grams[name].any()


def test_cosine_is_taken_at_the_blocks_and_not_behind_the_final_norm(
    any_model: PreTrainedModel, batches: list[torch.Tensor]
) -> None:
    blocks = find_blocks(any_model)
    stream = Stream(any_model, blocks, dicts(batches), CPU)
    plain = [hidden_by_block(any_model, batch) for batch in dicts(batches)]
    for block in blocks:
        expected = torch.cat([F.cosine_similarity(*pairs[block.index], dim=-1).flatten() for pairs in plain]).mean()
        assert observe(stream, block, BOTH).cosine == pytest.approx(float(expected), abs=1e-5)


def test_padding_counts_in_no_statistic(any_model: PreTrainedModel) -> None:
    ids = torch.randint(1, 63, (1, 12), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    mask = (torch.arange(17)[None] < 12).long()
    blocks = find_blocks(any_model)
    plain = Stream(any_model, blocks, [{"input_ids": ids}, {"input_ids": ids + 1}], CPU)
    with_padding = Stream(
        any_model, blocks, [{"input_ids": padded, "attention_mask": mask}, {"input_ids": ids + 1}], CPU
    )
    for block in blocks:
        one, two = observe(plain, block, BOTH), observe(with_padding, block, BOTH)
        assert two.cosine == pytest.approx(one.cosine, abs=1e-5)
        for name in one.norms:
            torch.testing.assert_close(one.norms[name], two.norms[name], rtol=1e-4, atol=1e-5)


def test_input_squares_by_hand() -> None:
    squares = InputSquares()
    squares.update(torch.tensor([[3.0, 4.0]]))
    assert squares.norm().tolist() == [3, 4]
    squares.update(torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(squares.norm(), torch.tensor([5.0, 8.0]).sqrt())


def test_input_gram_by_hand() -> None:
    gram = InputGram()
    gram.update(torch.tensor([[3.0, 4.0]]))
    assert gram.gram().tolist() == [[9, 12], [12, 16]]
    gram.update(torch.tensor([[1.0, 0.0]]))
    assert gram.gram().tolist() == [[5, 6], [6, 8]]


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 100])
def test_input_gram_is_whole_and_symmetric_at_any_width(width: int) -> None:
    x_PI = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    gram = InputGram()
    for part_PI in (x_PI[:2], x_PI[2:]):
        gram.update(part_PI)
    torch.testing.assert_close(gram.gram(), x_PI.T @ x_PI / 3)
    assert torch.equal(gram.gram(), gram.gram().T)
