"""A model of bfloat16 files that was trained in float32 is written in bfloat16 again, and that is what is measured."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.export.data_type import converted, export_dtype, stored_dtype
from lit_prune.export.formats import GGUF, HuggingFace
from lit_prune.export.plan import ExportPlan
from lit_prune.export.verify import verify
from lit_prune.models.files.mappable import headers
from lit_prune.models.load import load_model, load_tokenizer
from lit_prune.models.on_disk import keep_on_disk
from lit_prune.models.quantised import quantised_linears
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA, Recovery
from tests.conftest import WIDE, small_model

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IDS = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(1))
TEXT = [{"input_ids": IDS}]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_the_stored_type_is_that_of_the_files(dtype: torch.dtype, tmp_path: Path) -> None:
    small_model().to(dtype).save_pretrained(tmp_path)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=FP32)
    assert stored_dtype(model) == dtype
    (tmp_path / "model.safetensors").unlink()
    assert stored_dtype(model) is None


@pytest.mark.parametrize(("outtype", "stored"), [("f16", FP16), ("bf16", BF16), ("f32", FP32), ("q8_0", None)])
def test_the_stored_type_of_a_gguf_file(outtype: str, stored: torch.dtype | None, tmp_path: Path) -> None:
    model = small_model(vocab_size=4096)
    GGUF(outtype).write(ExportPlan.of(model), tmp_path, load_tokenizer("embedded"))  # type: ignore[arg-type]
    opened = load_model(str(tmp_path / "model.gguf"), "float32")
    assert stored_dtype(opened) == stored
    (tmp_path / "model.gguf").unlink()
    assert stored_dtype(opened) is None


def test_most_bytes_decide_in_files_of_several_types(tmp_path: Path) -> None:
    model = small_model().to(BF16)  # type: ignore[arg-type]
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    model.save_pretrained(tmp_path)
    assert stored_dtype(AutoModelForCausalLM.from_pretrained(tmp_path)) == BF16


def test_a_model_that_was_made_here_has_no_files(model: PreTrainedModel) -> None:
    assert stored_dtype(model) is None


@pytest.mark.parametrize(
    ("memory", "requested", "stored", "written"),
    [
        (FP32, None, BF16, BF16),
        (FP32, None, FP16, FP16),
        (FP32, None, None, FP32),
        (BF16, None, FP32, BF16),  # loaded in a narrower type on purpose
        (BF16, None, FP16, BF16),
        (FP32, "float32", BF16, FP32),
        (FP32, "float16", BF16, FP16),
    ],
)
def test_the_type_that_is_written(
    memory: torch.dtype, requested: str | None, stored: torch.dtype | None, written: torch.dtype
) -> None:
    assert export_dtype(small_model().to(memory), requested, stored) == written  # type: ignore[arg-type]


def test_weights_on_disk_are_not_converted(model: PreTrainedModel) -> None:
    keep_on_disk(model)
    assert export_dtype(model, "float32", None) == FP32
    with pytest.raises(InputError, match=r"`export.dtype` must be null with `model.on_disk`, .*, got bfloat16"):
        export_dtype(model, "bfloat16", None)


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_in_another_type_keeps_its_ties_and_leaves_the_model_alone(tied: bool) -> None:
    model = small_model(tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = converted(model, BF16)
    assert (copy.lm_head.weight is copy.model.embed_tokens.weight) == tied
    assert {tensor.dtype for tensor in copy.state_dict().values()} == {BF16}
    assert copy.dtype == copy.config.dtype == BF16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, before[name].to(BF16)) for name, tensor in copy.state_dict().items())


def test_a_value_too_large_for_float16(model: PreTrainedModel) -> None:
    model.model.norm.weight.data[0] = 1e5
    with pytest.raises(InputError, match=r"must be bfloat16 or float32, got float16, .* values of model.norm.weight"):
        converted(model, FP16)
    assert converted(model, BF16).dtype == BF16


def trained(recovery: Recovery | None, folder: Path, **fields: object) -> PreTrainedModel:
    """A model loaded in float32 from a folder in bfloat16, pruned, with its trainable weights moved a little."""
    small_model(**WIDE, **fields).to(BF16).save_pretrained(folder)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32)
    prune(model, [IDS], Recipe(Magnitude(), 0.5))
    if recovery is not None:
        recovery.attach(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape) * (parameter.data != 0)
    return model


RECOVERIES: list[Recovery | None] = [
    *(None, FullFineTuning(), MaskedLoRA(), LoRA()),
    *(QLoRA(), QLoRA(form="merged"), QLoRA(form="requantised"), QLoRA(quantization="int8")),
]


@pytest.mark.parametrize("recovery", RECOVERIES, ids=str)
def test_a_folder_is_in_bfloat16_and_its_perplexity_is_measured_in_float32(
    recovery: Recovery | None, tmp_path: Path
) -> None:
    model, folder = trained(recovery, tmp_path / "source"), tmp_path / "model"
    plan = ExportPlan.of(model, BF16)
    in_memory = measure(plan.reference, TEXT, "text").perplexity
    HuggingFace().write(plan, folder)
    checked = verify(folder, plan, HuggingFace(), (TEXT, "text"), perplexity=in_memory)
    opened = HuggingFace().open(folder, torch.device("cpu"), dtype=FP32)
    assert checked.perplexity == measure(opened, TEXT, "text").perplexity
    assert measure(opened, TEXT, "text").protocol.dtype == "float32"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert headers(str(folder))["model.norm.weight"].dtype == BF16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recovery", [None, FullFineTuning(), MaskedLoRA()], ids=str)
def test_a_folder_is_as_big_as_its_source(recovery: Recovery | None, tied: bool, tmp_path: Path) -> None:
    model, folder = trained(recovery, tmp_path / "source", tie_word_embeddings=tied), tmp_path / "model"
    plan = ExportPlan.of(model, BF16)
    HuggingFace().write(plan, folder)
    stored, source = headers(str(folder)), headers(str(tmp_path / "source"))
    assert stored == source
    assert plan.bytes == sum(2 * torch.Size(header.shape).numel() for header in source.values())


def test_the_adapter_beside_rounded_weights_stays_in_float32(tmp_path: Path) -> None:
    model, folder = trained(LoRA(), tmp_path / "source"), tmp_path / "model"
    plan = ExportPlan.of(model, BF16)
    HuggingFace().write(plan, folder)
    opened = HuggingFace().open(folder, torch.device("cpu"), dtype=plan.compute_dtype).state_dict()
    factors = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    assert factors
    assert all(torch.equal(opened[name], tensor) for name, tensor in factors.items())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_stay_as_they_are(quantization: str, tmp_path: Path) -> None:
    model = trained(QLoRA(quantization=quantization), tmp_path / "source")  # type: ignore[arg-type]
    plan = ExportPlan.of(model, BF16)
    pairs = list(zip(quantised_linears(plan.plain), quantised_linears(plan.base), strict=True))
    assert len(pairs) == 21
    assert all(torch.equal(written.weight, base.weight) for (_, written), (_, base) in pairs)
    assert plan.plain.model.embed_tokens.weight.dtype == BF16
