"""A model without its adapter: the weights are shared, a merge is W + alpha / r * B A, and the model stays as it is."""

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.models.quantised import dequantised, quantisation
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, MaskedLoRA, QLoRA
from lit_prune.recover.merge import merged, without_adapter
from tests.conftest import small_model


def with_adapter(model: PreTrainedModel, recovery: LoRA | MaskedLoRA | QLoRA) -> PreTrainedModel:
    """``model`` in evaluation, under an adapter that does something."""
    recovery.attach(model)
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=random) * 0.05).to(parameter.dtype)
    return model.eval()


def test_a_model_without_an_adapter_is_returned_as_it_is(model: PreTrainedModel) -> None:
    assert without_adapter(model) is model
    assert merged(model).state_dict().keys() == model.state_dict().keys()


def test_without_adapter_shares_the_weights_and_their_ties(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    expected = model(batches[0]).logits
    plain = without_adapter(with_adapter(model, LoRA()))
    layer = model.model.layers[0].self_attn.q_proj
    assert plain.model.layers[0].self_attn.q_proj.weight.data_ptr() == layer.base_layer.weight.data_ptr()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in (*plain.parameters(), *plain.buffers()))
    assert torch.equal(plain(batches[0]).logits, expected)


def test_a_merge_adds_the_scaled_product_and_leaves_the_model(batches: list[torch.Tensor]) -> None:
    model = with_adapter(small_model(), LoRA(r=8, alpha=16))
    expected, before = model(batches[0]).logits, {name: t.clone() for name, t in model.state_dict().items()}
    plain = merged(model)
    layer = model.model.layers[0].mlp.up_proj
    total = layer.base_layer.weight + 16 / 8 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    torch.testing.assert_close(plain.model.layers[0].mlp.up_proj.weight, total)
    torch.testing.assert_close(plain(batches[0]).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_merge_of_a_tied_head_unties_it(batches: list[torch.Tensor]) -> None:
    model = with_adapter(small_model(), MaskedLoRA(target_modules=["lm_head", "up_proj"]))
    expected, embedding = model(batches[0]).logits, model.model.embed_tokens.weight
    plain = merged(model)
    assert torch.equal(plain.model.embed_tokens.weight, embedding)
    assert not torch.equal(plain.lm_head.weight, embedding)
    torch.testing.assert_close(plain(batches[0]).logits, expected, rtol=1e-4, atol=1e-5)
    assert (model.config.tie_word_embeddings, plain.config.tie_word_embeddings) == (True, False)


def test_a_masked_merge_keeps_every_zero(batches: list[torch.Tensor]) -> None:
    model = small_model()
    prune(model, batches, Recipe())
    zero = {name: tensor == 0 for name, tensor in model.state_dict().items() if "_proj" in name}
    plain = merged(with_adapter(model, MaskedLoRA()))
    assert sum(int(where.sum()) for where in zero.values()) > 10_000
    assert all(torch.equal(plain.state_dict()[name] == 0, where) for name, where in zero.items())


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "model.layers.1.mlp.up_proj"), ("gpt2", "transformer.h.1.mlp.c_fc")]
)
def test_a_quantised_model_is_merged_into_full_precision(family: str, name: str) -> None:
    model = with_adapter(small_model(family), QLoRA(quantization="int8", form="merged", r=8, alpha=16))
    layer = model.get_submodule(name)
    total = dequantised(layer.base_layer) + 16 / 8 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert quantisation(without_adapter(model)) == {"quantization": "int8", "double_quant": False}
    plain = merged(model)
    assert quantisation(plain) is None
    assert not hasattr(plain.config, "quantization_config")
    weight = plain.get_submodule(name).weight
    torch.testing.assert_close(weight.T if family == "gpt2" else weight, total)  # gpt2 stores its weights (in, out)
