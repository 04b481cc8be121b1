"""The callback around a LightningModule of somebody's own, in a plain Trainer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lit_prune.callbacks import DynamicPruningCallback
from torch.utils.data import DataLoader

from lit_prune import distributed
from lit_prune.allocate import LayerRedundancy, Uniform
from lit_prune.calibration.windows import Calibration, Windows, draw_windows
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.evaluation.sizes import parameters
from lit_prune.masks.zeros import zeros
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.models.quantised import MASK
from lit_prune.models.remote_code.modeling_sliced import SlicedCausalLM
from lit_prune.pruning import Magnitude, Wanda
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA, Recovery, adapter_config
from lit_prune.slice import Slicing
from tests.conftest import small_model

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Foreign(LightningModule):
    """Somebody's own module: an HF model in ``self.model``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch, labels=batch["input_ids"]).loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def loader(seed: int = 0, rows: int = 32) -> DataLoader:
    ids = torch.randint(1, 64, (rows, 16), generator=torch.Generator().manual_seed(seed))
    return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=4)


def callback(**fields: Any) -> DynamicPruningCallback:
    settings = {"method": Wanda(), "recovery": LoRA(), "calibration": Calibration(num_samples=8, seq_length=16)}
    return DynamicPruningCallback(**{**settings, **fields})


def sparsity(module: Foreign) -> float:
    linears = [w for name, w in module.model.named_parameters() if "_proj" in name and ".lora_" not in name]
    zero, total = zeros(linears)
    return zero / total


def fit(module: Foreign, pruning: DynamicPruningCallback, val: DataLoader | None = None, **fields: Any) -> Trainer:
    ckpt_path = fields.pop("ckpt_path", None)
    settings = {**QUIET, "max_steps": 4, "enable_checkpointing": False, **fields}
    callbacks = [pruning, *settings.pop("callbacks", [])]
    trainer = Trainer(**settings, callbacks=callbacks)
    if ckpt_path is not None:
        trainer.ckpt_path = ckpt_path
    trainer.fit(module, loader(), val)
    return trainer


def test_prunes_before_the_first_step_and_recovers_with_zeros_kept() -> None:
    module, pruning = Foreign(), callback(sparsity=0.5)
    fit(module, pruning, loader(1))
    assert sparsity(module) == pytest.approx(0.5, abs=1e-3)
    assert adapter_config(module.model) is not None
    assert any(p.abs().sum() > 0 for n, p in module.model.named_parameters() if "lora_B" in n)
    assert len(pruning.run.done[0].scores) == len(pruning.run.done[0].rates) == 3


def test_perplexity_is_measured_before_and_after_the_cut_on_what_the_trainer_validates() -> None:
    module, pruning = Foreign(), callback(sparsity=0.6)
    dense = measure(small_model(), list(loader(1))[:2], "x").perplexity
    fit(module, pruning, loader(1), limit_val_batches=2)
    assert pruning.run.done[0].perplexity["before"] == pytest.approx(dense)
    assert pruning.run.done[0].perplexity["after"] != pytest.approx(dense)
    assert pruning.run.done[0].protocol.windows == 8
    assert pruning.run.done[0].protocol.data == "validation dataloader"


def test_a_share_of_the_validation_batches() -> None:
    pruning = callback()
    fit(Foreign(), pruning, loader(1), limit_val_batches=0.5)
    assert pruning.run.done[0].protocol.windows == 16


@pytest.mark.parametrize(("fields", "val"), [({}, None), ({"measure": False}, loader(1))])
def test_without_validation_nothing_is_measured(fields: dict[str, Any], val: DataLoader | None) -> None:
    pruning = callback(**fields)
    fit(Foreign(), pruning, val)
    assert pruning.run.done[0].perplexity == {}
    assert pruning.run.done[0].protocol is None


def test_the_calibration_is_the_first_rows_of_the_training_loader() -> None:
    module, other = Foreign(), Foreign()
    pruning = callback(calibration=Calibration(num_samples=6, seq_length=16), recovery=LoRA())
    fit(module, pruning)
    from lit_prune.pipeline import prune
    from lit_prune.recipe import Recipe

    rows = torch.cat([batch["input_ids"] for batch in loader()])[:6]
    assert prune(other.model, [rows], Recipe()).rates == pytest.approx(pruning.run.done[0].rates, abs=1e-6)


def test_switched_off(tmp_path: Path) -> None:
    module, resumed = Foreign(), Foreign()
    trainer = fit(module, callback(method=None, recovery=None))
    assert sparsity(module) == 0
    assert adapter_config(module.model) is None
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit(resumed, callback(method=None, recovery=None), ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters(), strict=True))


def test_without_a_method_the_recovery_trains_the_model_as_it_is() -> None:
    module = Foreign()
    fit(module, callback(method=None))
    assert sparsity(module) == 0
    assert adapter_config(module.model) is not None
    assert {".lora_" in name for name, parameter in module.named_parameters() if parameter.requires_grad} == {True}


def test_pruned_weights_that_would_be_trained_are_refused_before_anything_is_done() -> None:
    module = Foreign()
    with pytest.raises(InputError, match="`pruning.recovery` must be given if .*: use MaskedLoRA, FullFine"):
        fit(module, callback(recovery=None))
    assert sparsity(module) == 0


def test_no_recovery_where_the_llm_is_frozen() -> None:
    module = Foreign()
    module.model.requires_grad_(False)
    module.model.model.norm.weight.requires_grad_(True)
    fit(module, callback(recovery=None))
    assert sparsity(module) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_checkpoint_resumes_with_masks_adapter_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, first = Foreign(), Foreign()
    fit(whole, callback(), max_steps=4)
    trainer = fit(first, callback(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert stored[structure.KEY]["snapshot"]["adapter"]["r"] == 8
    resumed, pruning = Foreign(), callback()
    monkeypatch.setattr("lit_prune.callbacks.dynamic_pruning.prune", None)  # there is no second cut
    fit(resumed, pruning, max_steps=4, ckpt_path=tmp_path / "half.ckpt")
    assert pruning.run.done[0].rates == pytest.approx(stored["callbacks"]["DynamicPruningCallback"]["done"][0]["rates"])
    assert sparsity(resumed) == pytest.approx(0.5, abs=1e-3)
    zero = [(a == 0) == (b == 0) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True) if a.ndim == 2]
    assert all(bool(same.all()) for same in zero[:4])


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("recovery", [MaskedLoRA(), FullFineTuning()])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_foreign_module_and_its_optimizer_keep_the_zeros_and_resume(
    recovery: Recovery, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    first, pruning = Foreign(), callback(recovery=recovery)
    fit(first, pruning, max_steps=2, **fields).save_checkpoint(tmp_path / "half.ckpt")
    assert sparsity(first) == pytest.approx(0.5, abs=1e-3)
    resumed = Foreign()
    monkeypatch.setattr("lit_prune.callbacks.dynamic_pruning.prune", None)  # there is no second cut
    fit(resumed, callback(recovery=recovery), max_steps=4, ckpt_path=tmp_path / "half.ckpt", **fields)
    assert first.model.state_dict().keys() == resumed.model.state_dict().keys()
    before = dict(first.model.named_parameters())
    moved = 0
    for name, parameter in resumed.model.named_parameters():
        if "_proj" in name and ".lora_" not in name:
            gone = before[name] == 0
            assert (parameter[gone] == 0).all()
        moved += int((parameter != before[name]).sum())
    assert moved > 1000


def slicing(**fields: Any) -> DynamicPruningCallback:
    return callback(method=Slicing(), sparsity=0.25, allocation=LayerRedundancy(base=0.2), **fields)


def test_slices_before_the_first_step_and_recovers() -> None:
    module, pruning = Foreign(), slicing()
    dense = parameters(module.model)
    fit(module, pruning, loader(1))
    assert isinstance(module.model, SlicedCausalLM)
    assert sum(module.model.config.slice_sizes[:3]) == 72
    assert any(p.abs().sum() > 0 for n, p in module.model.named_parameters() if "lora_B" in n)
    before, after = pruning.run.done[0].size["before"], pruning.run.done[0].size["after"]
    assert before.parameters == dense
    assert after.parameters == sum(p.numel() for n, p in module.model.named_parameters() if ".lora_" not in n)
    assert after.bytes == 4 * after.parameters
    assert all(getattr(size.speed, name) > 0 for size in (before, after) for name in ("prefill", "decode"))


def test_speed_is_not_measured_where_nothing_is() -> None:
    pruning = slicing(measure=False)
    fit(Foreign(), pruning, loader(1))
    assert pruning.run.done[0].size["after"].speed is None


def test_a_sliced_model_may_be_trained_whole() -> None:
    module = Foreign()
    fit(module, slicing(recovery=None), max_steps=2)
    shortcut = module.model.model.layers[0].attention_shortcut
    assert shortcut.requires_grad
    assert shortcut.shape == (24, 24)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_checkpoint_resumes_with_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Foreign()
    trainer = fit(first, slicing(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, pruning = Foreign(), slicing()
    monkeypatch.setattr("lit_prune.callbacks.dynamic_pruning.prune", None)  # there is no second cut
    fit(resumed, pruning, max_steps=2, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.model.config.slice_sizes == first.model.config.slice_sizes
    assert pruning.run.done[0].size["before"].parameters == parameters(small_model())
    one, other = first.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_llm_is_found_by_target() -> None:
    module = Foreign()
    module.net = SimpleNamespace(llm=module.model)
    assert callback(target="net.llm").find_model(module) is module.model
    with pytest.raises(
        InputError, match=r"`pruning.target` must be the attribute of Foreign .*`net` is SimpleNamespace"
    ):
        callback(target="net").find_model(module)


def test_a_strategy_without_cuts_is_refused() -> None:
    trainer = SimpleNamespace(strategy=SimpleNamespace(), callbacks=[])
    with pytest.raises(InputError, match="`trainer.strategy` must be ddp or ModelParallelStrategy .* got Simple"):
        callback().setup(trainer, Foreign(), "fit")  # type: ignore[arg-type]


def test_other_stages_touch_nothing() -> None:
    module = Foreign()
    Trainer(**QUIET, enable_checkpointing=False, callbacks=[callback()]).validate(module, loader(), verbose=False)
    assert sparsity(module) == 0


def test_half_precision_weights_are_pruned_in_the_precision_they_are_trained_in() -> None:
    module, pruning = Foreign(), callback(method=Magnitude(), allocation=Uniform())
    fit(module, pruning, loader(1), precision="bf16-true")
    assert pruning.run.done[0].protocol.dtype == "bfloat16"
    for block in find_blocks(small_model()):
        for name in block.linears:
            weight = module.model.model.layers[block.index].get_submodule(name).base_layer.weight
            assert zeros([weight])[0] == round(weight.numel() * 0.5)


@pytest.mark.parametrize("at_step", [0, 1])
def test_ddp_does_not_send_the_masks_of_quantised_weights_in_every_step(at_step: int) -> None:
    module = Foreign()
    module.register_buffer("mine", torch.zeros(1))
    module._ddp_params_and_buffers_to_ignore = ["mine"]  # type: ignore[assignment]
    fit(
        module,
        callback(at_step=at_step, recovery=QLoRA(form="merged", quantization="int8")),
        max_steps=2,
        limit_val_batches=0,
    )
    masks = {name for name, _ in module.named_buffers() if name.endswith(MASK)}
    assert len(masks) == 3 * 7
    assert {"mine", *masks} == set(module._ddp_params_and_buffers_to_ignore)  # type: ignore[arg-type]


class Data(LightningDataModule):
    """With windows for calibration."""

    def calibration_windows(self, num_samples: int, seq_length: int, seed: int) -> Windows:
        return draw_windows(torch.arange(1, 64), num_samples, seq_length, seed)

    def train_dataloader(self) -> DataLoader:
        return loader()


def test_too_few_calibration_windows_for_the_processes_are_told_before_there_is_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "agree_on_threads", lambda: None)
    few = Calibration(num_samples=2, seq_length=8, batch_size=2)
    module: Any = Foreign()
    monkeypatch.setattr(module, "configure_model", lambda: (_ for _ in ()).throw(InterruptedError))
    told = "`calibration.num_samples` must give every process a batch, got 1 batches for 2 processes"
    for method, error, match in ((Wanda(), InputError, told), (Magnitude(), InterruptedError, None)):
        pruning = callback(method=method, allocation=Uniform(), at_step=1, calibration=few)
        with pytest.raises(error, match=match):
            Trainer(**QUIET, max_steps=2, callbacks=[pruning]).fit(module, datamodule=Data())
