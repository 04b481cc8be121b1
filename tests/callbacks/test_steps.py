"""Cuts at chosen steps: what is trained before, between and after them, by hooks and by whole fits."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lit_prune.callbacks import DynamicPruningCallback, ResultsCallback

from lit_prune.errors import InputError
from lit_prune.masks.zeros import zeros
from lit_prune.models import structure
from lit_prune.models.remote_code.modeling_sliced import SlicedCausalLM
from lit_prune.pruning import Magnitude, MixedNofM, SparseGPT, Wanda
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, adapter_config
from lit_prune.schedule import Linear
from lit_prune.slice import Slicing
from tests.callbacks.test_dynamic_pruning import QUIET, Foreign, callback, fit, loader, slicing, sparsity
from tests.conftest import small_model


class Watch(Callback):
    """Notes, before every batch and after the cut, what the module is like."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        model = pl_module.model
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.seen.append(
            {
                "step": trainer.global_step,
                "sparsity": round(sparsity(pl_module), 2),  # type: ignore[arg-type]
                "rank": (adapter_config(model) or {}).get("r"),
                "whole": "model.embed_tokens.weight" in trained,
                "sliced": isinstance(model, SlicedCausalLM),
                "optimizer": id(trainer.optimizers[0]),
                "parameters": {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]},
                "trained": {id(parameter) for parameter in model.parameters() if parameter.requires_grad},
            }
        )

    def of(self, name: str) -> list[Any]:
        return [seen[name] for seen in self.seen]


def watched(pruning: DynamicPruningCallback, **fields: Any) -> tuple[Foreign, Watch]:
    module, watch = Foreign(), Watch()
    fit(module, pruning, fields.pop("val", None), callbacks=[watch, *fields.pop("callbacks", [])], **fields)
    assert all(seen["parameters"] == seen["trained"] for seen in watch.seen)
    return module, watch


def test_all_is_trained_before_the_cut_and_the_adapter_after_it() -> None:
    pruning = callback(at_step=2)
    module, watch = watched(pruning, max_steps=4)
    assert watch.of("sparsity") == [0, 0, 0.5, 0.5]
    assert watch.of("whole") == [True, True, False, False]
    assert watch.of("rank") == [None, None, 8, 8]
    assert len(set(watch.of("optimizer"))) == 2
    assert sparsity(module) == pytest.approx(0.5, abs=1e-3)
    assert [done.step for done in pruning.run.done] == [2]


def test_an_adapter_before_the_cut_is_merged_and_a_fresh_one_comes() -> None:
    pruning = callback(at_step=2, before=LoRA(r=3), recovery=LoRA(r=5))
    module, watch = watched(pruning, max_steps=3)
    assert watch.of("rank") == [3, 3, 5]
    assert not any(watch.of("whole"))
    dense = small_model().state_dict()
    moved = module.model.model.layers[0].self_attn.q_proj.base_layer.weight
    kept = moved != 0
    assert not torch.equal(moved[kept], dense["model.layers.0.self_attn.q_proj.weight"][kept])
    assert torch.equal(module.model.model.embed_tokens.weight, dense["model.embed_tokens.weight"])


def test_folding_changes_nothing_that_the_model_computes() -> None:
    ids = torch.arange(1, 9)[None]
    for recovery, masked in ((LoRA(r=4), False), (MaskedLoRA(r=4), True)):
        model = small_model()
        if masked:
            model.model.layers[1].mlp.up_proj.weight.data[:, ::2] = 0
            structure.write(model, masked=True)
        plain = {name for name, _ in model.named_modules()}
        recovery.attach(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        before = model(ids).logits
        recovery.detach(model)
        torch.testing.assert_close(model(ids).logits, before)
        assert {name for name, _ in model.named_modules()} == plain
        assert adapter_config(model) is None
        assert not masked or (model.model.layers[1].mlp.up_proj.weight[:, ::2] == 0).all()
        recovery.attach(model)  # another may come
        assert adapter_config(model) is not None


def test_slices_at_a_later_step_with_all_trained_before_and_after() -> None:
    pruning = slicing(at_step=2, recovery=None)
    _, watch = watched(pruning, max_steps=3)
    assert watch.of("sliced") == [False, False, True]
    assert all(watch.of("whole"))
    assert pruning.run.source_weights is None


@pytest.mark.parametrize("recovery", [MaskedLoRA(), FullFineTuning()])
@pytest.mark.parametrize("method", [Wanda(), Magnitude(), SparseGPT(), Wanda(MixedNofM(4))])
def test_what_is_pruned_stays_pruned_from_cut_to_cut(method: Any, recovery: Any) -> None:
    gone: list[dict[str, torch.Tensor]] = []

    class Gone(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            weights = pl_module.model.state_dict().items()
            gone.append({n.replace(".base_layer", ""): w == 0 for n, w in weights if "_proj" in n and "lora" not in n})

    pruning = callback(method=method, at_step=[0, 2, 4], sparsity=[0.25, 0.5, 0.75], recovery=recovery)
    _, watch = watched(pruning, max_steps=6, callbacks=[Gone()])
    assert watch.of("sparsity") == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    for earlier, later in pairwise(gone):
        assert all(bool(later[name][zero].all()) for name, zero in earlier.items())
    assert [done.sparsity for done in pruning.run.done] == pytest.approx([0.25, 0.5, 0.75], abs=1e-3)
    scores = [done.scores for done in pruning.run.done]
    assert scores[0] != scores[1] != scores[2]  # computed anew


def test_a_step_is_one_of_the_optimizer_and_the_cut_comes_once() -> None:
    pruning = callback(at_step=[1, 2], sparsity=0.5, schedule=Linear(), recovery=MaskedLoRA())
    _, watch = watched(pruning, max_steps=3, accumulate_grad_batches=2)
    assert watch.of("step") == [0, 0, 1, 1, 2, 2]
    assert watch.of("sparsity") == [0, 0, 0.25, 0.25, 0.5, 0.5]
    assert len(set(watch.of("optimizer"))) == 3


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_the_fresh_adapter_is_in_float32_and_the_rest_in_the_precision_of_the_trainer(precision: str) -> None:
    module, _ = watched(callback(at_step=1, recovery=MaskedLoRA()), max_steps=2, precision=precision)
    wanted = torch.bfloat16 if precision == "bf16-true" else torch.float32
    adapter = {name for name, _ in module.named_parameters() if ".lora_" in name}
    assert {p.dtype for name, p in module.named_parameters() if name in adapter} == {torch.float32}
    assert {p.dtype for name, p in module.named_parameters() if name not in adapter} == {wanted}


def test_best_scores_begin_anew_at_a_cut(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="{step}")
    stopping = EarlyStopping("val/loss", patience=1)
    fields: dict[str, Any] = {"val_check_interval": 1, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    pruning = callback(at_step=3, sparsity=0.9, recovery=MaskedLoRA())
    watched(pruning, val=loader(1), max_steps=5, callbacks=[best, stopping], **fields)
    assert best.best_model_path == str(tmp_path / "step=5.ckpt")  # worse than before the cut, and best after it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=3.ckpt", "step=5.ckpt"]
    assert len(pruning.run.done[0].perplexity) == 2


def test_every_cut_is_logged_and_reported(tmp_path: Path) -> None:
    logger, results = CSVLogger(tmp_path, name="logs"), ResultsCallback(str(tmp_path / "run"))
    pruning = callback(at_step=[0, 2], recovery=MaskedLoRA())
    watched(pruning, val=loader(1), max_steps=4, callbacks=[results], logger=logger, log_every_n_steps=1)
    lines = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    logged = {int(row["step"]): float(row["pruning/sparsity"]) for row in rows if row["pruning/sparsity"]}
    assert logged == pytest.approx({0: 0.4375, 2: 0.5, 4: 0.5}, abs=1e-3)  # the last with the results
    assert all(row["pruning/block_2"] for row in rows if row["pruning/sparsity"] and int(row["step"]) < 4)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [cut["step"] for cut in report["cuts"]] == [0, 2]
    assert [cut["requested"] for cut in report["cuts"]] == pytest.approx([0.4375, 0.5])
    first, second = (cut["perplexity"] for cut in report["cuts"])
    assert report["perplexity"]["dense"] == first["before"]
    assert report["perplexity"]["pruned"] == second["after"]
    assert report["sparsity"]["requested"] == 0.5
    assert len(report["cuts"][1]["rates"]) == 3
    assert "rates" not in report  # they are those of the cuts
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "during training, before optimizer steps 0 (43.7" in card


def test_a_training_that_ends_before_a_cut_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    class Enough(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = True

    results = ResultsCallback(str(tmp_path / "run"))
    watched(callback(at_step=[0, 3], recovery=MaskedLoRA()), max_steps=5, callbacks=[Enough(), results])
    told = " ".join(capsys.readouterr().err.split())
    assert "Warning: training ended at step 1, before the cut at step 3: 1 of 2 cuts were made." in told
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["cuts_not_made"] == [{"step": 3, "sparsity": 0.5}]
    assert report["sparsity"]["requested"] == report["recipe"]["sparsity"] < 0.5


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_foreign_module_loads_what_its_checkpoint_leaves_out(tmp_path: Path) -> None:
    class Named(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.model.name_or_path = "somewhere"

    sizes = {}
    for full in (False, True):
        first = Named()
        fit(first, callback(full_checkpoint=full), max_steps=2).save_checkpoint(tmp_path / "half.ckpt")
        stored = torch.load(tmp_path / "half.ckpt", weights_only=True)
        sizes[full] = sum(tensor.numel() for tensor in stored["state_dict"].values())
        resumed = Named()
        fit(resumed, callback(full_checkpoint=full), max_steps=2, ckpt_path=tmp_path / "half.ckpt")
        one, other = first.state_dict(), resumed.state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)
    adapter = sum(p.numel() for n, p in first.named_parameters() if "lora_" in n)
    assert sizes == {False: adapter, True: sum(tensor.numel() for tensor in one.values())}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"at_step": [0, 2]}, r"`pruning.recovery` must keep zeros .*, for 2 cuts of masks, got LoRA.*use MaskedLoRA"),
        ({"at_step": [0, 2], "method": Slicing()}, r"`pruning.at_step` must be one step for Slicing, which"),
        ({"at_step": 4}, r"`pruning.at_step` must be below the number of optimizer steps, 4 .*, got 4"),
        ({"at_step": 3, "max_steps": -1, "max_epochs": 1, "limit_train_batches": 3}, "optimizer steps, 3 .*, got 3"),
        ({"at_step": 1, "recovery": None}, "`pruning.recovery` must be given if pruned weights are trained"),
        (
            {"at_step": [1, 2], "sparsity": [0.2, 0.9], "max_rate": 0.8, "recovery": MaskedLoRA()},
            "`pruning.sparsity` must be between 0 and 0.8",
        ),
        ({"at_step": 1, "before": LoRA(target_modules=["no"])}, "`LoRA.target_modules` must match linears"),
    ],
)
def test_what_cannot_be_is_refused_before_work(fields: dict[str, Any], message: str) -> None:
    settings = dict(fields)
    training = {
        name: settings.pop(name) for name in ("max_steps", "max_epochs", "limit_train_batches") if name in settings
    }
    module = Foreign()
    with pytest.raises(InputError, match=message):
        fit(module, callback(**settings), **training)
    assert zeros(module.parameters())[0] == zeros(Foreign().parameters())[0]
    assert adapter_config(module.model) is None


def test_an_adapter_before_the_cut_of_a_model_that_is_masked_already() -> None:
    module = Foreign()
    structure.write(module.model, masked=True)
    with pytest.raises(
        InputError, match=r"`pruning.before` must keep zeros .* a model that is masked already, got LoRA"
    ):
        fit(module, callback(at_step=1, before=LoRA()))


def test_the_trainer_of_a_loggerless_run_is_left_alone() -> None:
    trainer = Trainer(**QUIET, max_steps=1, enable_checkpointing=False, callbacks=[callback()])
    trainer.fit(Foreign(), loader())
    assert trainer.loggers == []
