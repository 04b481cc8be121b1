import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.models.load import EMBEDDED, load_config, load_model, load_tokenizer, locate, new_model
from lit_prune.models.quantised import Linear8bit, quantised_linears
from lit_prune.recover import QLoRA
from tests.conftest import SMALL, WIDE, export, small_model


def test_embedded_is_a_small_llama_with_its_tokenizer() -> None:
    model, tokenizer = load_model("embedded"), load_tokenizer("embedded")
    assert model.config.model_type == "llama"
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 5e6
    assert model.dtype == torch.bfloat16
    assert tokenizer.vocab_size == model.config.vocab_size == 4096
    text = "Return the sum of a 'start' value.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert sum(file.stat().st_size for file in EMBEDDED.glob("*.safetensors")) < 10e6


def test_dtype() -> None:
    assert load_model("embedded", "float32").dtype == torch.float32


def test_a_folder(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).hidden_size == 32
    assert load_model(str(tmp_path)).config.num_hidden_layers == 3


def test_a_fresh_model() -> None:
    assert new_model({"model_type": "qwen3", **SMALL}).config.model_type == "qwen3"
    with pytest.raises(InputError, match="must have a `model_type`"):
        new_model({"hidden_size": 32})
    with pytest.raises(InputError, match="no config that transformers knows"):
        new_model({"model_type": "lama"})


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "~/none", "tests/typo", "a/b/c", "none.gguf", "../x"])
def test_a_path_that_is_not_there_is_told_at_once(name: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(InputError, match="no such file or folder"):
        locate(name)
    assert time.perf_counter() - begin < 1


def test_a_hub_id_without_a_hub() -> None:
    with pytest.raises(InputError, match="not in the hub's cache and HF_HUB_OFFLINE is set; pass a local folder"):
        locate("nobody/nothing")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(InputError, match=r"`model.pretrained`.*Name or service not known.*pass a local folder"):
        locate("nobody/nothing")


@pytest.mark.parametrize("name", ["my--model", "a..b", "model."])
def test_a_name_that_no_hub_has(name: str) -> None:
    with pytest.raises(InputError, match="no model on the hub can be named so"):
        locate(name)


def test_broken_weights(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    told = r"cannot be loaded: model.safetensors is damaged \(.*\): download or copy that file again"
    with pytest.raises(InputError, match=told):
        load_model(str(tmp_path))


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path, max_shard_size="20kB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=f"cannot be loaded: {lost.name} is missing: download or copy that file again"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("load", [load_config, load_model])
def test_weights_in_fp8_are_refused(load: Callable[[str], object], tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"must not be stored in FP8 \(fp8\).*dequantize=True"):
        load(str(tmp_path))


def test_a_package_that_is_missing_is_named_without_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_fields: object) -> None:
        raise ImportError("Loading an AWQ model needs the package x.")

    monkeypatch.setattr("lit_prune.models.load.AutoModelForCausalLM.from_pretrained", refuse)
    with pytest.raises(InputError, match=r"`model.pretrained`: Loading an AWQ model needs the package x\.$"):
        load_model("embedded")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a Hugging Face model folder, got .*it has no config.json"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(tmp_path))
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(InputError, match="must be a folder, a .gguf file or a hub id"):
        locate(str(tmp_path / "file.txt"))


def test_the_folder_of_a_run_says_where_its_model_is(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    small_model().save_pretrained(run / "model")
    for load in (load_config, load_model):
        with pytest.raises(InputError, match=rf"it has no config.json. Did you mean {run}/model\?$"):
            load(str(run))
    (other / "model").mkdir(parents=True)
    with pytest.raises(InputError, match=r"it has no config.json.$"):
        load_config(str(other))
    (other / "model" / "model.gguf").touch()
    for folder in (other, other / "model"):
        with pytest.raises(InputError, match=rf"it has no config.json. Did you mean {other}/model/model.gguf\?$"):
            load_config(str(folder))


def test_a_quantised_folder_can_be_moved_and_loads_a_state_dict(tmp_path: Path) -> None:
    model = small_model("llama", **WIDE)
    QLoRA(quantization="int8").attach(model)
    export(model, tmp_path)
    opened = load_model(str(tmp_path))
    assert {type(module) for _, module in quantised_linears(opened)} == {Linear8bit}
    assert opened.device.type == "cpu"
