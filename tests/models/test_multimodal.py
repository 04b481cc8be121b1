"""A model with a vision tower: the language model is pruned, adapted and quantised, and the whole is exported."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.evaluation.speed import tokens_per_second
from lit_prune.export.formats import HuggingFace
from lit_prune.export.verify import verify
from lit_prune.models.families import blocks_path
from lit_prune.models.load import skeleton
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, MaskedLoRA, QLoRA
from tests.conftest import export, multimodal_model

IDS = torch.randint(1, 64, (3, 16), generator=torch.Generator().manual_seed(1))


def trained(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_language_model_is_pruned_and_the_whole_exported(tmp_path: Path) -> None:
    model = multimodal_model()
    assert blocks_path(model) == blocks_path(skeleton(model.config)) == "model.language_model.layers"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, [IDS], Recipe(sparsity=0.5))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 3 * 7
    assert all(name.startswith("model.language_model.layers.") for name in changed)
    verify(tmp_path, export(model, tmp_path), HuggingFace())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.state_dict().keys() == before.keys()
    assert torch.equal(opened(IDS).logits, model(IDS).logits)


def test_adapters_are_in_the_language_model_alone() -> None:
    for leaf in (LoRA(), MaskedLoRA(), LoRA(target_modules=["q_proj", "k_proj"])):
        model = multimodal_model()
        leaf.check(model)
        leaf.attach(model)
        assert len(trained(model)) == 3 * len(leaf.target_modules or range(7)) * 2
        assert all(name.startswith("model.language_model.layers.") for name in trained(model))


def test_no_3d_parameter_of_a_tower_is_a_mixture_of_experts() -> None:
    model = multimodal_model()
    assert any(parameter.ndim == 3 for parameter in model.parameters())
    QLoRA(form="merged").check(model)
    QLoRA(form="merged").attach(model)
    quantised = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert len(quantised) == 3 * 7
    assert all(".language_model.layers." in name for name in quantised)


def test_the_text_config_has_the_vocabulary_and_the_limit() -> None:
    assert tokens_per_second(multimodal_model()).prefill > 0
    with pytest.raises(InputError, match="must be at most 64, the model's limit, got 65"):
        prune(multimodal_model(), [torch.ones(1, 65, dtype=torch.long)], Recipe())
