"""LoRA: the linears that get an adapter."""

import pytest
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.recover import LoRA
from tests.conftest import small_model


def test_lora_trains_the_adapter_alone(model: PreTrainedModel) -> None:
    LoRA(r=4, target_modules=["q_proj"]).attach(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name and "q_proj" in name for name in trained)
    assert len(trained) == 6


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_lora_leaves_fused_experts_and_linears_of_their_names_alone(family: str) -> None:
    model = small_model(family)
    LoRA().attach(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 4 * 2
    assert all(".self_attn." in name for name in trained)


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj", "experts"])
def test_lora_on_fused_experts_is_refused(target: str) -> None:
    told = (
        rf"`LoRA.target_modules` must match .* got '{target}'; there are k_proj, o_proj, q_proj, v_proj; fused experts"
    )
    with pytest.raises(InputError, match=told):
        LoRA(target_modules=[target]).check(small_model("qwen3_moe"))


def test_lora_takes_the_matrices_of_gpt2() -> None:
    LoRA(target_modules=["c_attn"]).check(small_model("gpt2"))
    with pytest.raises(InputError, match="there are c_attn, c_fc, c_proj, lm_head"):
        LoRA(target_modules=["q_proj"]).check(small_model("gpt2"))


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
def test_lora_leaves_the_out_proj_of_mamba_alone(family: str) -> None:
    model = small_model(family)
    with pytest.raises(InputError, match="got 'out_proj'; .*; the kernels of Mamba read the weight of out_proj"):
        LoRA(target_modules=["out_proj"]).check(model)
    LoRA().attach(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("in_proj" in name for name in trained)
    assert not any("out_proj" in name for name in trained)
