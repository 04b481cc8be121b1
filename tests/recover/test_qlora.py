"""QLoRA: zeros, bytes, gradients, the forms of the export, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import full_bytes, parameters, pruned, size_bytes
from lit_prune.export.formats import HuggingFace
from lit_prune.export.plan import ExportPlan, check_merge, form_of
from lit_prune.export.verify import verify
from lit_prune.masks.zeros import zeros
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.models.quantised import compute_exactly, dequantised, mask, quantised_linears
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA, Snapshot, adapter_config
from lit_prune.recover.existing_masks import attach, check_kept, take_zeros
from lit_prune.recover.layers.masked_quantised import MaskedQuantised
from lit_prune.recover.merge import without_adapter
from lit_prune.slice import Slicing
from tests.callbacks.test_dynamic_pruning import callback, fit
from tests.conftest import WIDE, export, small_model

FORMS: list[Any] = ["adapter", "merged", "requantised"]
KINDS: list[Any] = ["nf4", "fp4", "int8"]


def healed(family: str = "llama", sliced: bool = False, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model pruned, quantised, under an adapter that does something; in training."""
    model, batch = small_model(family, **WIDE).to(dtype), ids()  # type: ignore[arg-type]
    prune(model, [batch], Recipe(Slicing(), 0.25) if sliced else Recipe())
    return recovering(model, **fields)


def recovering(model: Any, **fields: Any) -> Any:
    """``model`` quantised, under an adapter that does something; in training."""
    QLoRA(**{"r": 3, **fields}).attach(model)
    return with_weights(model)


def with_weights(model: Any) -> Any:
    """``model`` with an adapter that does something; in training."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=random) * 0.05).to(parameter.dtype)
    return model.train()


def ids() -> Tensor:
    return torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    compute_exactly(model)
    return model.eval()(ids(), use_cache=False).logits


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def dense_weights(family: str = "llama") -> dict[str, Tensor]:
    model = small_model(family, **WIDE)
    prune(model, [ids()], Recipe())
    return {f"{b.path}.{name}": linear.weight_OI for b in find_blocks(model) for name, linear in b.linears.items()}


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_an_export_reopens_as_it_was_written_with_every_zero(form: Any, quantization: Any, tmp_path: Path) -> None:
    family = "gpt2" if quantization == "fp4" else "llama"  # whose matrices lie the other way
    model = healed(family, form=form, quantization=quantization)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = export(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = opened(tmp_path)
    assert (adapter_config(found) is not None) is (form == "adapter")
    assert any(True for _ in quantised_linears(found)) is (form != "merged")
    assert hasattr(found.config, "quantization_config") is (form != "merged")
    assert plan.reference is (plan.plain if form == "requantised" else model)
    torch.testing.assert_close(logits(found), logits(plan.reference), rtol=1e-4, atol=1e-6)
    weights = dense_weights(family)
    blocks = find_blocks(without_adapter(found), quantised=True)
    for block in blocks:
        for name, linear in block.linears.items():
            assert (linear.weight_OI[weights[f"{block.path}.{name}"] == 0] == 0).all()


def test_the_form_says_what_is_trained() -> None:
    for form_, masked in (("adapter", False), ("merged", True), ("requantised", True)):
        model = healed(form=form_)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert len(layers) == 3 * 7
        assert all(isinstance(layer, MaskedQuantised) is masked for layer in layers)
        assert form_of(Snapshot.of(model)) == form_
        assert ExportPlan.of(model).merged is masked
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(trained) == 3 * 7 * 2
        assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("quantization", KINDS)
def test_parameters_bytes_and_zeros_are_counted_as_they_are(quantization: Any, tmp_path: Path) -> None:
    dense = small_model(**WIDE)
    model = healed(quantization=quantization)
    plain = export(model, tmp_path).plain
    assert parameters(plain) == parameters(dense)
    assert size_bytes(plain) == sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert full_bytes(plain) == size_bytes(dense)
    assert size_bytes(plain) < full_bytes(plain) * (0.4 if quantization == "int8" else 0.3)
    assert parameters(model) - parameters(plain) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    gone = sum(int((weight == 0).sum()) for weight in dense_weights().values())
    assert pruned(plain) == (gone + zeros(dense.parameters())[0], parameters(dense))
    blocks = Recipe().find(plain, quantised=True)
    assert sum(block.pruned for block in blocks) == gone
    assert sum(block.size for block in blocks) == sum(weight.numel() for weight in dense_weights().values())


@pytest.mark.parametrize(("family", "form", "quantization"), [("llama", "adapter", "int8"), ("gpt2", "merged", "nf4")])
def test_a_rebuilt_model_takes_a_checkpoint_bit_for_bit(family: str, form: Any, quantization: Any) -> None:
    model, fresh, file = healed(family, form=form, quantization=quantization), small_model(family, **WIDE), io.BytesIO()
    torch.save({"snapshot": Snapshot.of(model).to_dict(), "weights": model.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(stored["snapshot"])) == stored["snapshot"]
    Snapshot.from_dict(stored["snapshot"]).rebuild(fresh)
    Snapshot.from_dict(stored["snapshot"]).rebuild(fresh)
    fresh.load_state_dict(stored["weights"], strict=True)
    assert Snapshot.of(fresh).to_dict() == stored["snapshot"]
    assert torch.equal(logits(fresh), logits(model))
    masks = {name: mask(module) for name, module in quantised_linears(fresh)}
    assert all(torch.equal(mask(module), masks[name]) for name, module in quantised_linears(model))


@pytest.mark.parametrize(("form", "quantization"), [("adapter", "int8"), ("merged", "nf4"), ("requantised", "int8")])
def test_over_slices_nothing_is_masked_and_the_widths_stay(form: Any, quantization: Any, tmp_path: Path) -> None:
    model = healed(sliced=True, form=form, quantization=quantization)
    assert not any(isinstance(module, MaskedQuantised) for module in model.modules())
    assert all(mask(module) is None for _, module in quantised_linears(model))
    plan = export(model, tmp_path)
    found = opened(tmp_path)
    assert found.config.slice_sizes == model.config.slice_sizes
    assert plan.merged is (form != "adapter")
    assert (adapter_config(found) is not None) is (form == "adapter")
    assert plan.reference is (plan.plain if form == "requantised" else model)
    torch.testing.assert_close(logits(found), logits(plan.reference), rtol=1e-4, atol=1e-6)


def broken(module: Any) -> None:
    """Fills zeros of a quantised weight: fifteen is one, in NF4."""
    module.weight.data.fill_(0xFF)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_an_export_of_weights_whose_zeros_were_filled_is_refused(form: Any, tmp_path: Path) -> None:
    model = healed(form=form, target_modules=["q_proj"])
    broken(model.model.layers[1].mlp.up_proj)
    with pytest.raises(RuntimeError, match=r"pruned are not zero in the exported model.layers.1.mlp.up_proj weight"):
        export(model, tmp_path)


def test_a_folder_whose_zeros_were_filled_is_refused(tmp_path: Path) -> None:
    model = healed(form="merged")
    plan = ExportPlan.of(model)
    plan.plain.model.layers[2].self_attn.k_proj.weight.data += 1
    HuggingFace().write(plan, tmp_path)
    with pytest.raises(RuntimeError, match=r"not zero in the exported model's model.layers.2.self_attn.k_proj weight"):
        verify(tmp_path, plan, HuggingFace())


def test_half_precision_and_a_cut_in_mid_training() -> None:
    class Half(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_model(**WIDE)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.model(**batch, labels=batch["input_ids"]).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    module = Half()
    fit(module, callback(at_step=2, recovery=QLoRA(form="merged")), max_steps=4, precision="bf16-true")
    packed = [module for _, module in quantised_linears(module.model)]
    assert len(packed) == 3 * 7
    assert all(dequantised(one).dtype == torch.bfloat16 for one in packed)
    assert structure.masked(module.model)


def test_refusals() -> None:
    for fields, message in (
        ({"r": 0}, "`QLoRA.r` must be at least 1"),
        ({"dropout": 1.0}, r"`QLoRA.dropout` must be in \[0, 1\)"),
        ({"quantization": "nf3"}, "`QLoRA.quantization` must be one of fp4, int8, nf4, got 'nf3'. Did you mean nf4"),
        (
            {"form": "merge"},
            "`QLoRA.form` must be one of adapter, merged, requantised, got 'merge'. Did you mean merged",
        ),
    ):
        with pytest.raises(InputError, match=message):
            QLoRA(**fields)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`QLoRA.target_modules` must match .*got 'no'"):
        QLoRA(target_modules=["no"]).check(small_model(**WIDE))
    with pytest.raises(InputError, match="must not be QLoRA for a mixture of fused experts.*use LoRA or MaskedLoRA"):
        QLoRA().check(small_model("mixtral"))
    told = r"`QLoRA.quantization` must be int8 .*or `QLoRA.form` merged, got nf4: model.layers.0.self_attn.q_proj has"
    with pytest.raises(InputError, match=told):
        QLoRA().check(small_model())
    for one in (QLoRA(form="merged"), QLoRA(quantization="int8")):
        one.check(small_model())
        one.check_sizes("Slicing", 8)
    with pytest.raises(
        InputError, match="`QLoRA.form` must be merged after Slicing, or `quantization` int8, got requantised in fp4"
    ):
        QLoRA(form="requantised", quantization="fp4").check_sizes("Slicing", 32)
    QLoRA().check_sizes("MLPWidth", 64)


def test_merge_of_an_adapter_that_stays_beside_quantised_weights_is_refused() -> None:
    with pytest.raises(
        InputError, match="`merge` must be left out for an adapter that was trained to stay.*form merged"
    ):
        check_merge(Snapshot.of(healed()))
    for form_ in ("merged", "requantised"):
        check_merge(Snapshot.of(healed(form=form_)))


def test_a_quantised_model_is_not_pruned_again() -> None:
    plain = ExportPlan.of(healed(form="requantised")).plain
    with pytest.raises(InputError, match="`model` must be pruned in full precision, self_attn.q_proj is quantised"):
        prune(plain, [ids()], Recipe())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_folder_is_trained_on_by_lora_beside_it(quantization: Any, tmp_path: Path) -> None:
    export(healed(form="requantised", quantization=quantization), tmp_path / "first")
    first = opened(tmp_path / "first")
    for other in (MaskedLoRA(), FullFineTuning(), QLoRA(), None):
        with pytest.raises(
            InputError, match=r"`pruning.recovery` must be LoRA for a model whose linears are quant.*got"
        ):
            check_kept(first, other)
    check_kept(first, LoRA(r=3))
    attach(first, LoRA(r=3))
    with_weights(first)
    assert form_of(Snapshot.of(first)) == "adapter"
    export(first, tmp_path / "second")
    second, before = opened(tmp_path / "second"), opened(tmp_path / "first")
    assert adapter_config(second) is not None
    torch.testing.assert_close(logits(second), logits(first), rtol=1e-4, atol=1e-6)
    packed = without_adapter(second).state_dict()
    assert all(torch.equal(packed[name], tensor) for name, tensor in before.state_dict().items())
    Snapshot.of(first).rebuild(before)  # a run that goes on
    before.load_state_dict(first.state_dict())
    assert torch.equal(logits(before), logits(first))


def test_zeros_of_rounding_are_no_mask(tmp_path: Path) -> None:
    export(recovering(small_model(**WIDE), form="requantised"), tmp_path)
    model = opened(tmp_path)
    del model.config.lit_prune
    assert zeros(dequantised(module) for _, module in quantised_linears(model))[0] > 0.05 * 3 * 7 * 64 * 16
    for keep in (None, False):
        take_zeros(model, keep, LoRA())
    assert not structure.masked(model)
    with pytest.raises(InputError, match="`pruning.keep_zeros` must be null for a quantised model without a record"):
        take_zeros(model, True, LoRA())
