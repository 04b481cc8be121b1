"""A sliced model is an ordinary Hugging Face folder, and opens with and without this package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from lit_prune.allocate import LayerRedundancy
from lit_prune.models.load import Dtype, load_model
from lit_prune.models.remote_code.modeling_sliced import (
    SLICED,
    SlicedCausalLM,
    SlicedLlamaConfig,
    SlicedLlamaForCausalLM,
    take_shape,
)
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.slice import Slicing
from tests.conftest import lively_model

FAMILIES = sorted(SLICED)
IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def sliced_model(family: str = "llama", **fields: object) -> PreTrainedModel:
    return sliced(lively_model(family, **fields))


def sliced(model: PreTrainedModel) -> PreTrainedModel:
    batches = list(torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(1)).split(2))
    prune(model, batches, Recipe(Slicing(multiple=4), 0.25, LayerRedundancy(base=0.1)))
    return model


def generated(model: PreTrainedModel, ids: torch.Tensor = IDS, mask: torch.Tensor | None = None, **fields: object):  # type: ignore[no-untyped-def]
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **fields}
    return model.generate(ids, attention_mask=mask, **settings).tolist()  # type: ignore[operator]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, dtype: Dtype, tmp_path: Path) -> None:
    lively_model(family).save_pretrained(tmp_path / "dense")
    model = sliced(load_model(str(tmp_path / "dense"), dtype))
    model.save_pretrained(tmp_path / "one")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(opened) is SLICED[family]
    assert opened.dtype == getattr(torch, dtype)
    assert torch.equal(opened(IDS).logits, model(IDS).logits)
    assert generated(opened) == generated(model)
    opened.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    for file in ("config.json", "modeling_sliced.py"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()


def test_what_the_folder_says(tmp_path: Path) -> None:
    model = sliced_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "sliced_llama"
    assert config["architectures"] == ["SlicedLlamaForCausalLM"]
    assert config["slice_sizes"] == model.config.slice_sizes
    assert config["hidden_size"] == 32
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_sliced.SlicedLlamaForCausalLM"
    assert not config["tie_word_embeddings"]
    assert (tmp_path / "generation_config.json").is_file()


def test_shards(tmp_path: Path) -> None:
    model = sliced_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = sliced_model(family, **({"dropout": 0.0, "attention_dropout": 0.0} if family == "opt" else {}))
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    shortcuts = [name for name in gradients[0] if "shortcut" in name]
    assert len(shortcuts) == (3 if family == "phi" else 6)
    assert all(gradients[0][name].abs().sum() > 0 for name in shortcuts)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_nothing(family: str) -> None:
    model = sliced_model(family)
    cache = DynamicCache(config=model.config)
    first = model(IDS[:, :7], past_key_values=cache, use_cache=True).logits
    rest = [model(IDS[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(7, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), model(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family: str) -> None:
    model = sliced_model(family)
    ids, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    ids[0], mask[0] = IDS[0], 1
    ids[1, 5:], mask[1, 5:] = IDS[1, :7], 1
    together = generated(model, ids, mask)
    assert [together[0][12:], together[1][12:]] == [
        generated(model, IDS[:1])[0][12:],
        generated(model, IDS[1:, :7])[0][7:],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementations_agree(family: str, tmp_path: Path) -> None:
    model = sliced_model(family)
    model.save_pretrained(tmp_path)
    sdpa, eager = (load_model(str(tmp_path), "float32", kind) for kind in ("sdpa", "eager"))
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    torch.testing.assert_close(eager(IDS).logits, sdpa(IDS).logits, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_attentions_are_told() -> None:
    model = sliced_model(attn_implementation="eager")
    told = model(IDS, output_hidden_states=True, output_attentions=True)
    assert [state.shape[-1] for state in told.hidden_states] == model.config.slice_sizes
    assert len(told.attentions) == 3


def test_dropout_is_that_of_the_family() -> None:
    for family, fields in {"phi": {"resid_pdrop": 0.5}, "phi3": {"resid_pdrop": 0.5}, "opt": {"dropout": 0.5}}.items():
        model = sliced_model(family, **fields)
        assert torch.equal(model(IDS).logits, model(IDS).logits)
        model.train()
        assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_widths_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="`slice_sizes` must give 3 widths, one a layer and the head's, got None"):
        SlicedLlamaForCausalLM(SlicedLlamaConfig(num_hidden_layers=2))
    with pytest.raises(TypeError, match="takes its other arguments by keyword, got 1 more"):
        sliced_model().model.layers[0](torch.ones(1, 2, 28), None)


def test_a_fresh_model_of_given_widths() -> None:
    model = sliced_model()
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert torch.isfinite(fresh(IDS).logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoints_weights_come_into_a_dense_model_that_takes_the_shape(family: str) -> None:
    model, other = sliced_model(family), lively_model(family)
    take_shape(other, model.config.slice_sizes)
    assert isinstance(other, SlicedCausalLM)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("how", ["import lit_prune", "trust_remote_code"])
def test_a_fresh_process_opens_it(how: str, tmp_path: Path) -> None:
    model = sliced_model()
    model.save_pretrained(tmp_path / "folder")
    hidden = "sys.modules['lit_prune'] = None"
    package = how == "import lit_prune"
    code = (
        f"import sys, torch; {how if package else hidden}\n"
        "from transformers import AutoModelForCausalLM\n"
        f"more = {{}} if {package} else {{'trust_remote_code': True}}\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'folder')!r}, **more)\n"
        "print(type(model).__module__, model(torch.arange(1, 9)[None]).logits.double().sum().item())\n"
        "print(model.generate(torch.arange(1, 9)[None], max_new_tokens=4, do_sample=False).tolist())\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    module, total = said[0].split()
    assert module.startswith("lit_prune." if package else "transformers_modules.")
    assert float(total) == model(torch.arange(1, 9)[None]).logits.double().sum().item()
    expected = model.generate(torch.arange(1, 9)[None], max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert said[1] == str(expected.tolist())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_modelling_file_needs_nothing_of_this_package() -> None:
    source = Path(sys.modules[SlicedCausalLM.__module__].__file__ or "").read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert len(imports) > 10
    assert not [line for line in imports if "lit_prune" in line or "from ." in line]


def test_the_evaluation_harness_takes_it(embedded: PreTrainedModel, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from lit_prune.models.load import load_tokenizer

    batches = list(torch.randint(1, 4096, (4, 64), generator=torch.Generator().manual_seed(0)).split(2))
    prune(embedded, batches, Recipe(Slicing(), 0.25, LayerRedundancy()))
    tokenizer = load_tokenizer("embedded")
    embedded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = ("Return the number of items in", " a container.")
    asked = [Instance("loglikelihood", {}, text, 0)]
    for pretrained in (embedded, str(tmp_path)):
        harness = HFLM(pretrained=pretrained, tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=1)
        [(told, _)] = harness.loglikelihood(asked, disable_tqdm=True)
        context, whole = (tokenizer(part, return_tensors="pt")["input_ids"] for part in (text[0], "".join(text)))
        logits = embedded(whole).logits.float().log_softmax(-1)
        start = context.shape[1]
        expected = logits[0, start - 1 : -1].gather(1, whole[0, start:, None]).sum().item()
        assert told == pytest.approx(expected, rel=1e-4)
