import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.models.families import FAMILIES, config_of, find_blocks
from tests import conftest


def test_every_family_is_tested() -> None:
    tested = {fields.get("model_type", case) for case, fields in conftest.FAMILIES.items()}
    assert tested == FAMILIES.keys()


def test_every_matrix_of_every_family_is_a_linear_but_routers(any_model: PreTrainedModel) -> None:
    blocks = find_blocks(any_model)
    assert [block.index for block in blocks] == [0, 1, 2]
    for block in blocks:
        matrices = {
            name: parameter
            for name, parameter in block.module.named_parameters()
            if parameter.ndim > 1 and name != "mlp.gate.weight"
        }
        assert block.size == sum(parameter.numel() for parameter in matrices.values())
        assert {id(linear.parameter) for linear in block.linears.values()} == set(map(id, matrices.values()))


def test_blocks_of_a_mixture_may_differ() -> None:
    model = conftest.small_model("qwen3_moe")
    assert list(find_blocks(model)[1].linears)[4:] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    chosen = find_blocks(model, targets=["down_proj"], ignore=[r"mlp\.experts\.[12]\..*"])
    assert [list(block.linears) for block in chosen] == [
        ["mlp.experts.0.down_proj", "mlp.experts.3.down_proj"],
        ["mlp.down_proj"],
        ["mlp.experts.0.down_proj", "mlp.experts.3.down_proj"],
    ]
    with pytest.raises(InputError, match=r"nothing to prune in block 1 of self_attn.q_proj, .*, mlp.down_proj\."):
        find_blocks(model, targets=["gate_up_proj"])
    with pytest.raises(InputError, match=r"got 'x'; there are .*, mlp.experts.0.down_proj, mlp.gate_proj"):
        find_blocks(model, targets=["x"])


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


def test_blocks_without_linears(model: PreTrainedModel) -> None:
    model.model.layers = torch.nn.ModuleList([torch.nn.LayerNorm(4)])
    with pytest.raises(InputError, match="must lead to blocks with linears, there is none among LayerNorm"):
        find_blocks(model)


def test_a_list_of_the_right_length_that_is_not_alone_is_asked_for() -> None:
    stranger = conftest.small_model("stablelm")
    stranger.model.others = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])
    with pytest.raises(InputError, match=r"`pruning.blocks` must be given for .*'stablelm': .*model.layers, model.oth"):
        find_blocks(stranger)
    assert len(find_blocks(stranger, blocks="model.layers")) == 3
    del stranger.model.layers[2], stranger.model.others
    with pytest.raises(InputError, match="of the model's lists of modules none has 3 with linears"):
        find_blocks(stranger)


@pytest.mark.parametrize(("path", "message"), [("model.leyers", "must be a path"), ("model.norm", "LlamaRMSNorm")])
def test_a_path_that_leads_to_no_blocks(model: PreTrainedModel, path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_blocks(model, blocks=path)


def test_quantised_and_adapted_weights_are_refused(model: PreTrainedModel) -> None:
    from lit_prune.models import structure
    from lit_prune.recover import LoRA, QLoRA

    LoRA().attach(model)
    with pytest.raises(InputError, match="must be pruned before adapters are attached, .*: merge it by peft's `merge_"):
        find_blocks(model)
    structure.write(model, masked=True)
    with pytest.raises(InputError, match="masks whose zeros a merge would fill: train with .* MaskedLoRA.*, or give"):
        find_blocks(model)
    packed = conftest.small_model(hidden_size=64, intermediate_size=64)
    QLoRA().attach(packed)
    with pytest.raises(InputError, match=r"is quantised \(torch.uint8\): prune the model that it was made from"):
        find_blocks(packed)
    quantised = conftest.small_model()
    weight = quantised.model.layers[0].mlp.up_proj.weight
    quantised.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.data.to(torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="must be pruned in full precision, mlp.up_proj is quantised"):
        find_blocks(quantised)


def test_the_config_that_a_block_keeps() -> None:
    model = conftest.small_model()
    assert all(config_of(block) is model.config for block in find_blocks(model))
