"""The Hugging Face folder opens in plain transformers as what was in memory, and nothing in memory is changed."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.allocate import LayerRedundancy, Uniform
from lit_prune.evaluation.sizes import parameters
from lit_prune.export.formats import HuggingFace
from lit_prune.export.formats.folder import BASE, TRIED, name_base
from lit_prune.export.plan import Outline
from lit_prune.masks.zeros import zeros
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, MaskedLoRA, QLoRA, Recovery
from lit_prune.recover.base import ExportForm
from lit_prune.recover.merge import without_adapter
from lit_prune.shrink import MLPWidth
from lit_prune.slice import Slicing
from tests.conftest import WIDE, export, small_model


def recovered(model: PreTrainedModel, batches: list[torch.Tensor]) -> PreTrainedModel:
    """``model`` pruned, with an adapter that does something."""
    prune(model, batches, Recipe(sparsity=0.5))
    return with_adapter(model)


def with_adapter(model: PreTrainedModel) -> PreTrainedModel:
    LoRA().attach(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05
            parameter.data = noise.to(parameter.dtype)
    return model.eval()


def without_adapter_logits(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    model.disable_adapters()
    logits = model(batch).logits
    model.enable_adapters()
    return logits


def test_a_pruned_model_round_trips(any_model: PreTrainedModel, batches: list[torch.Tensor], tmp_path: Path) -> None:
    prune(any_model, batches, Recipe())
    export(any_model, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened(batches[0]).logits, any_model(batches[0]).logits)
    assert structure.record(opened) == structure.record(any_model)


def test_pruned_weights_and_adapter_open_together(
    any_model: PreTrainedModel, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model = recovered(any_model, batches)
    export(model, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(batches[0]).logits, model(batches[0]).logits)
    assert not torch.allclose(opened(batches[0]).logits, without_adapter_logits(model, batches[0]), atol=1e-3)
    pruned = find_blocks(without_adapter(opened))[0].linears
    assert all(zeros([linear.weight_OI])[0] > 0 for linear in pruned.values())


def test_the_zeros_are_on_disk_and_the_adapter_names_no_dense_model(
    model: PreTrainedModel, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    recovered(model, batches)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors")
    linears = [tensor for name, tensor in stored.items() if "_proj" in name]
    zero, total = zeros(linears)
    assert abs(zero / total - 0.5) < 1e-3
    assert not any("lora" in name or "base_layer" in name for name in stored)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE


def test_no_loader_takes_a_model_of_the_working_directory_for_the_base(
    model: PreTrainedModel, batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_model().save_pretrained(tmp_path / "other")
    recovered(model, batches)
    export(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "other")
    opened = AutoModelForCausalLM.from_pretrained("../model")
    torch.testing.assert_close(opened(batches[0]).logits, model(batches[0]).logits)
    with pytest.raises(OSError, match=f"'{BASE}'"):
        AutoPeftModelForCausalLM.from_pretrained("../model")


def test_peft_opens_a_folder_whose_adapter_names_it(
    model: PreTrainedModel, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    recovered(model, batches)
    export(model, tmp_path)
    name_base(tmp_path / "adapter_config.json", str(tmp_path))  # as in a repository on the hub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft finds the adapter that transformers has loaded, and puts it on again
        opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(batches[0]).logits, model(batches[0]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_a_sliced_model_is_merged_and_the_model_left_as_it_is(
    dtype: torch.dtype, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model = small_model().to(dtype)  # type: ignore[arg-type]
    prune(model, batches, Recipe(Slicing(), 0.25))
    with_adapter(model)
    expected, shortcut = model(batches[0]).logits, model.model.layers[1].mlp_shortcut.clone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = export(model, tmp_path).plain
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("lora" in name for name in plain.state_dict())
    layer = model.model.layers[0].mlp.up_proj
    total = (
        layer.base_layer.weight.float() + 2 * layer.lora_B.default.weight.float() @ layer.lora_A.default.weight.float()
    )
    torch.testing.assert_close(plain.model.layers[0].mlp.up_proj.weight, total.to(dtype), rtol=1e-3, atol=1e-3)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened.model.layers[1].mlp_shortcut, shortcut)
    if dtype == torch.float32:
        torch.testing.assert_close(opened(batches[0]).logits, expected)


def test_an_adapter_on_a_sliced_model_with_masks_is_not_merged(
    model: PreTrainedModel, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    prune(model, batches, Recipe(Slicing(), 0.25))
    recovered(model, batches)
    export(model, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(batches[0]).logits, model(batches[0]).logits)


def test_a_masked_adapter_is_merged_and_the_model_left_as_it_is(
    any_model: PreTrainedModel, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    prune(any_model, batches, Recipe())
    MaskedLoRA().attach(any_model)
    for name, parameter in any_model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected, before = any_model(batches[0]).logits, {n: t.clone() for n, t in any_model.state_dict().items()}
    export(any_model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())
    assert not (tmp_path / "adapter_config.json").exists()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(batches[0]).logits, expected, rtol=1e-4, atol=1e-5)
    pairs = zip(find_blocks(without_adapter(any_model)), find_blocks(opened), strict=True)
    for one, other in pairs:
        for name, linear in one.linears.items():
            assert torch.equal(linear.weight_OI == 0, other.linears[name].weight_OI == 0)


TIED = ["lm_head", "up_proj"]


@pytest.mark.parametrize(
    "recovery",
    [
        MaskedLoRA(target_modules=TIED),
        QLoRA(target_modules=TIED, form="merged"),
        QLoRA(target_modules=TIED, form="requantised"),
    ],
)
def test_a_tied_head_with_a_merged_adapter_is_a_matrix_of_its_own(
    recovery: Recovery, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model = small_model(**WIDE)
    prune(model, batches, Recipe())
    recovery.attach(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    plan = export(model.eval(), tmp_path)
    assert plan.unties_head
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(batches[0]).logits, plan.reference(batches[0]).logits, rtol=1e-4, atol=1e-5)
    assert parameters(opened) == parameters(plan.plain) == parameters(plan.base) + 64 * 64


def read_in_a_fresh_process(*folders: Path, trusted: Path | None = None) -> list[float]:
    """The sums of the logits of eight tokens, in a process that has transformers but not lit_prune."""
    code = (
        "import sys, torch; sys.modules['lit_prune'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"for folder in {[str(folder) for folder in folders]!r}:\n"
        f"    trust = folder == {str(trusted)!r}\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)\n"
        "    print(model(torch.arange(1, 9)[None]).logits.double().sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("recovery", [LoRA(), MaskedLoRA(target_modules=TIED)])
def test_a_fresh_process_opens_it_without_lit_prune(
    recovery: Recovery, model: PreTrainedModel, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    prune(model, batches, Recipe(sparsity=0.5))
    recovery.attach(model)
    for name, parameter in model.eval().named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    export(model, tmp_path)
    expected = model(torch.arange(1, 9)[None]).logits.double().sum().item()
    assert read_in_a_fresh_process(tmp_path) == pytest.approx([expected], abs=1e-3)


def test_a_fresh_process_opens_shrunk_models_without_lit_prune(batches: list[torch.Tensor], tmp_path: Path) -> None:
    """With equal sizes plainly, with different ones by the code in the folder."""
    expected = []
    for name, allocation in {"equal": Uniform(), "different": LayerRedundancy(base=0.1)}.items():
        shrunk = small_model()
        prune(shrunk, batches, Recipe(MLPWidth(multiple=8), 0.5, allocation))
        export(shrunk, tmp_path / name)
        expected.append(shrunk(torch.arange(1, 9)[None]).logits.double().sum().item())
    assert json.loads((tmp_path / "equal" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert not list((tmp_path / "equal").glob("*.py"))
    assert (
        len(set(json.loads((tmp_path / "different" / "config.json").read_text())["block_sizes"]["intermediate_size"]))
        > 1
    )
    opened = read_in_a_fresh_process(tmp_path / "equal", different := tmp_path / "different", trusted=different)
    assert opened == pytest.approx(expected, abs=1e-3)


def test_the_card_says_how_the_folder_is_opened() -> None:
    usage = HuggingFace().usage(Outline("full precision", "llama"), "other/model", ["import first"])
    assert usage.startswith("```python\nimport first\nfrom transformers import")
    assert 'AutoTokenizer.from_pretrained("other/model")\n```' in usage
    assert f"verified with transformers {transformers.__version__}." in usage
    assert f"open with transformers {TRIED} too, if that knows the family." in usage
    assert "pass `trust_remote_code=False` to the tokenizer" in usage
    assert "trust_remote_code" not in HuggingFace().usage(Outline("full precision", "llama"), "x")
    assert "peft" not in usage
    assert "bitsandbytes" not in usage


def test_the_card_says_how_the_zeros_are_kept_in_training() -> None:
    def usage(form: ExportForm, masked: bool) -> str:
        return HuggingFace().usage(Outline(form, "llama", masked=masked), "this/folder")

    for form in ("full precision", "merged"):
        assert usage(form, True).endswith("from lit_prune import keep_zeros\n\nkeep_zeros(model)\n```")
        assert "keep_zeros" not in usage(form, False)
    assert "keep_zeros" not in usage("adapter", True)  # which leaves the weights as they are


def test_the_card_names_the_packages_that_a_folder_needs() -> None:
    usage = HuggingFace().usage(Outline("adapter", "llama", quantised=True), "this/folder")
    assert "quantised weights need bitsandbytes." in usage
    assert TRIED not in usage
    assert "without peft it loads the weights alone, unrecovered" in usage
    assert "`AutoPeftModelForCausalLM` does not open a local folder" in usage
