"""Logits of a model that computes block by block are those that it computes as a whole."""

import pytest
import torch

from lit_prune.evaluation.streamed import streamed_logits
from lit_prune.models.families import find_blocks
from tests.conftest import lively_model


@pytest.mark.parametrize("family", ["llama", "falcon", "gemma3_text", "gpt2", "mixtral"])
def test_logits_are_those_of_the_model(family: str) -> None:
    model = lively_model(family)
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    batches = [{"input_ids": ids}, {"input_ids": ids.flip(0), "attention_mask": mask}]
    with torch.no_grad():
        whole = [model(**batch, use_cache=False).logits for batch in batches]
    for batch, expected, logits in zip(
        batches, whole, streamed_logits(model, batches, model.device, "Perplexity"), strict=True
    ):
        counts = batch.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(logits[counts], expected[counts], rtol=1e-4, atol=1e-4)


def test_a_block_runs_all_batches_before_the_next(batches: list[torch.Tensor]) -> None:
    model, order = lively_model("llama"), []
    blocks = find_blocks(model)
    logits = streamed_logits(model, [{"input_ids": ids} for ids in batches], model.device, "Perplexity")
    for block in blocks:
        block.module.register_forward_hook(lambda *_, index=block.index: order.append(index))
    next(logits)
    embedded, last = [0, 1, 2] * len(batches), [0, 1, 2]  # passes in which the blocks are short-circuited
    assert order == [*embedded, 0, 0, 0, 1, 1, 1, 2, 2, 2, *last]
