import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.families import FAMILIES, find_blocks
from lit_prune.load import new_model
from tests import conftest


def test_every_family_is_tested() -> None:
    assert conftest.FAMILIES.keys() == FAMILIES.keys()


def test_blocks_and_linears_of_every_family(any_model: PreTrainedModel) -> None:
    blocks = find_blocks(any_model)
    assert [block.index for block in blocks] == [0, 1, 2]
    for block in blocks:
        assert len(block.linears) == 7
        assert block.size == sum(linear.weight.numel() for linear in block.linears.values())


def test_targets_and_ignore(model: PreTrainedModel) -> None:
    assert list(find_blocks(model, targets=["q_proj"])[0].linears) == ["self_attn.q_proj"]
    assert list(find_blocks(model, targets=[r"mlp\..*"], ignore=["down_proj"])[0].linears) == [
        "mlp.gate_proj",
        "mlp.up_proj",
    ]


def test_names_that_match_nothing(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=r"`pruning.targets` must match a linear, got 'qproj'; there are .*q_proj"):
        find_blocks(model, targets=["qproj"])
    with pytest.raises(InputError, match="`pruning.ignore` must match a linear, got 'x'"):
        find_blocks(model, ignore=["x"])
    with pytest.raises(InputError, match="leave nothing to prune"):
        find_blocks(model, targets=["q_proj"], ignore=["q_proj"])


def test_a_pattern_that_is_none(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=r"`pruning.targets` must be suffixes or regular expressions, '\*_proj'"):
        find_blocks(model, targets=["*_proj"])


def test_blocks_without_linears() -> None:
    gpt2 = new_model({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64})
    with pytest.raises(InputError, match="must lead to blocks made of nn.Linear, there is none among .*Conv1D"):
        find_blocks(gpt2, blocks="transformer.h")


def test_a_family_without_an_entry_needs_only_its_blocks() -> None:
    stranger = new_model(
        {"model_type": "stablelm", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 4}
    )
    with pytest.raises(
        InputError, match=r"'stablelm', which is not one of llama, mistral, qwen2, qwen3: masks need only"
    ):
        find_blocks(stranger)
    assert len(find_blocks(stranger, blocks="model.layers")) == 2


@pytest.mark.parametrize(("path", "message"), [("model.leyers", "must be a path"), ("model.norm", "LlamaRMSNorm")])
def test_a_path_that_leads_to_no_blocks(model: PreTrainedModel, path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_blocks(model, blocks=path)


def test_quantised_and_adapted_weights_are_refused(model: PreTrainedModel) -> None:
    from lit_prune.recover import LoRA

    LoRA().attach(model)
    with pytest.raises(InputError, match="must be pruned before adapters are attached"):
        find_blocks(model)
    quantised = conftest.small_model()
    weight = quantised.model.layers[0].mlp.up_proj.weight
    quantised.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.data.to(torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="must be pruned in full precision, mlp.up_proj is quantised"):
        find_blocks(quantised)
