"""A dense teacher in whole fits: when it is made, what it leaves alone, and how a resumed run has it again."""

import csv
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lit_prune.callbacks import DynamicPruningCallback
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lit_prune.allocate import DLP
from lit_prune.data.batches import training_windows
from lit_prune.data.loaders import ResumableLoader
from lit_prune.data.text import PackedWindows
from lit_prune.distill import Copy, Distillation, SparseDelta, TopK
from lit_prune.errors import InputError
from lit_prune.models import structure
from lit_prune.pruning import SparseGPT, Wanda
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA
from lit_prune.shrink import MLPWidth
from lit_prune.slice import Slicing
from tests.callbacks.test_dynamic_pruning import QUIET, Foreign, callback, fit, loader
from tests.checkpointing.test_resume import KeepAll, assert_same, ended, run, text  # noqa: F401 (a fixture)
from tests.checkpointing.test_resume import callback as of_embedded
from tests.conftest import export, small_model

IDS = torch.arange(1, 17)[None]


def dense_of(pruning: DynamicPruningCallback) -> torch.Tensor:
    """The output of a run's teacher."""
    assert pruning.run.teaching is not None
    assert pruning.run.teaching.distilled is not None
    output: Any = pruning.run.teaching.distilled.teacher.output({"input_ids": IDS})
    return output.logits_NV


class Watch(Callback):
    """Notes what is logged, and what the model says right before every batch."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.said: list[torch.Tensor] = []

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.said.append(pl_module.model(IDS).logits[0])

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Slow(Foreign):
    """With something to say, learning in small steps."""

    def __init__(self) -> None:
        super().__init__()
        self.model.model.embed_tokens.weight.data.mul_(5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-3)


@pytest.mark.parametrize("teacher", [Copy(), Copy("nf4"), SparseDelta(), TopK(64)], ids=str)
def test_a_fit_under_a_teacher(teacher: Any) -> None:
    module, pruning, watch = Slow(), callback(distillation=Distillation(1.0, 1.0, teacher)), Watch()
    trainer = fit(module, pruning, callbacks=[watch], max_steps=8)
    assert [name for name in watch.logged[0] if name.startswith("train/")] == [
        "train/cross_entropy",
        "train/distillation",
    ]
    losses = [logged["train/distillation"] for logged in watch.logged]
    assert losses[-1] < 0.95 * losses[0]
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in module.model.named_parameters() if ".lora_" in name}
    plain, alone = Slow(), callback()
    fit(plain, alone, max_steps=8)
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert not all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_a_weight_of_nearly_nothing_trains_as_without_a_teacher() -> None:
    ended = []
    for fields in ({}, {"distillation": Distillation(weight=1e-30)}):
        torch.manual_seed(0)
        module = Foreign()
        fit(module, callback(**fields))
        ended.append(module.state_dict())
    assert_same(*ended)


@pytest.mark.parametrize(
    "fields",
    [
        {"recovery": LoRA()},
        {"recovery": FullFineTuning(), "distillation": Distillation(teacher=Copy("bfloat16"))},
        {"at_step": 2, "before": LoRA(r=2)},
        {"at_step": [1, 3], "recovery": MaskedLoRA()},
        {"at_step": [0, 2], "recovery": FullFineTuning()},
        {"method": Slicing(), "at_step": 2, "sparsity": 0.25, "recovery": None},
    ],
    ids=str,
)
def test_the_teacher_is_the_model_right_before_the_first_cut(fields: dict[str, Any]) -> None:
    pruning, watch, module = callback(**{"distillation": Distillation(), **fields}), Watch(), Foreign()
    at_step = fields.get("at_step", 0)
    first = at_step[0] if isinstance(at_step, list) else at_step
    said = [small_model()(IDS).logits.detach()[0]]

    class Before(Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            said.append(pl_module.model(IDS).logits[0])

    fit(module, pruning, callbacks=[watch, Before()], max_steps=5)
    exact = pruning.fit_plan.distillation is not None and pruning.fit_plan.distillation.teacher == Copy()
    torch.testing.assert_close(dense_of(pruning).float(), said[first], **({} if exact else {"rtol": 0.1, "atol": 0.02}))
    assert not torch.allclose(watch.said[first], said[first], atol=1e-3)  # it was cut
    assert ["train/distillation" in logged for logged in watch.logged] == [step >= first for step in range(5)]


def test_the_teacher_is_in_no_checkpoint_and_no_export(tmp_path: Path) -> None:
    module, pruning = Foreign(), callback(distillation=Distillation(), recovery=MaskedLoRA())
    module.model.name_or_path = "somewhere"  # has a source
    trainer = fit(module, pruning)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert stored[structure.KEY]["teacher"]["weights"] is None
    assert len(stored["state_dict"]) < len(module.state_dict())
    export(module.model, tmp_path / "out")
    plain = Foreign()
    fit(plain, callback(recovery=MaskedLoRA()))
    export(plain.model, tmp_path / "plain")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "plain")]
    assert sizes[0] == sizes[1]
    assert (
        structure.record(module.model)["distillation"] == "Distillation(temperature=1.0, weight=0.5, teacher=Copy("
        "store='same'))"
    )


class Unlabelled(Foreign):
    """Works its loss out by itself."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.model(**batch).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def test_a_module_that_gives_no_labels_is_refused_at_its_first_step() -> None:
    with pytest.raises(
        InputError, match="must be null unless Unlabelled.training_step calls the LLM with `labels`: ret"
    ):
        fit(Unlabelled(), callback(distillation=Distillation()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": None}, "`pruning.distillation` must be null without `pruning.method`"),
        ({"distillation": Distillation(teacher=SparseDelta()), "method": SparseGPT()}, "must not be SparseDelta here"),
        ({"distillation": Distillation(teacher=TopK()), "at_step": 2}, "must not be TopK if the first cut"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_model(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        callback(**{"distillation": Distillation(), **fields})


CASES: dict[str, dict[str, Any]] = {
    "copy": {"recovery": LoRA(r=4, dropout=0.2)},
    "removed": {"recovery": MaskedLoRA(dropout=0.2), "teacher": SparseDelta()},
    "top k": {"recovery": LoRA(r=4), "teacher": TopK(8)},
    "4 bits, later": {"recovery": LoRA(r=4), "teacher": Copy("nf4"), "at_step": 3, "before": LoRA(r=2)},
    "gradual, full": {"recovery": FullFineTuning(), "at_step": [1, 3], "sparsity": [0.3, 0.6]},
    "quantised": {"recovery": QLoRA(r=4)},
    "slices": {"method": Slicing(), "recovery": None, "at_step": 3},
    "channels": {
        "method": MLPWidth(),
        "allocation": DLP(),
        "recovery": LoRA(r=4),
        "at_step": [1, 3],
        "sparsity": [0.25, 0.5],
    },
}


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_goes_on_has_the_same_teacher(case: str, text: Path) -> None:  # noqa: F811
    fields = dict(CASES[case])
    fields = {"method": Wanda(), "distillation": Distillation(2.0, 0.7, fields.pop("teacher", None)), **fields}
    usual = {"max_steps": 6, "val_check_interval": None, "limit_val_batches": 0}
    whole = ended(run(text, of_embedded(**fields), KeepAll(), **usual))
    for step in (2, 5) if case == "4 bits, later" else (4,):
        torch.manual_seed(step)
        path = text / "checkpoints" / f"{step}.ckpt"
        assert torch.load(path, weights_only=True, mmap=True)["global_step"] == step
        assert_same(whole, ended(run(text, of_embedded(**fields), resume=path, **usual)))


class Going(Foreign):
    """With a loader of its own that goes on where it was."""

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(loader().dataset, batch_size=4, seed=0)


def resumed(
    tmp_path: Path, first: DynamicPruningCallback, again: DynamicPruningCallback, scale: float, **fields: Any
) -> Trainer:
    """Goes on with another model than the checkpoint was made from, if the scale is not 1."""
    settings = {**QUIET, "enable_checkpointing": False, "max_steps": 3}

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    Trainer(**settings, callbacks=[first, Keep()]).fit(Going())
    module = Going()
    module.model.model.norm.weight.data.mul_(scale)
    trainer = Trainer(**{**settings, **fields}, callbacks=[again])
    trainer.ckpt_path = tmp_path / "x.ckpt"
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("teacher", [SparseDelta(), TopK(8)], ids=str)
def test_a_dense_model_that_is_another_is_refused(teacher: Any, tmp_path: Path) -> None:
    distillation = Distillation(teacher=teacher)
    resumed(tmp_path, *(callback(distillation=distillation) for _ in range(2)), scale=1.0)
    with pytest.raises(
        InputError, match="must be the model that the checkpoint was made from; the weights of the teacher"
    ):
        resumed(tmp_path, *(callback(distillation=distillation) for _ in range(2)), scale=2.0)


def test_a_training_whose_windows_were_looked_up_cannot_become_longer(tmp_path: Path) -> None:
    for teacher, told in (
        (Copy(), None),
        (TopK(8), "`trainer.max_steps` must be what the checkpoint was made with, 3"),
    ):
        first, again = (callback(distillation=Distillation(teacher=teacher)) for _ in range(2))
        with nullcontext() if told is None else pytest.raises(InputError, match=told):
            resumed(tmp_path, first, again, scale=1.0, max_steps=4)


def test_a_copy_without_a_source_is_in_the_checkpoint(tmp_path: Path) -> None:
    first, again = (callback(distillation=Distillation(), recovery=FullFineTuning()) for _ in range(2))
    resumed(tmp_path, first, again, scale=2.0)
    assert torch.equal(dense_of(first), dense_of(again))


def test_another_distillation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="`pruning.distillation` must be what the checkpoint was made with, null, got D"
    ):
        resumed(tmp_path, callback(), callback(distillation=Distillation()), scale=1.0)


def test_a_checkpoint_that_is_told_too_late(tmp_path: Path) -> None:
    pruning = callback(distillation=Distillation(), at_step=1)
    trainer = fit(Foreign(), pruning, max_steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    late = callback(distillation=Distillation(), at_step=1)
    late.run.done, late.run.teaching.distilled = pruning.run.done, None  # type: ignore[union-attr]
    with pytest.raises(InputError, match="`trainer.ckpt_path` must be set before `trainer.fit` is called if"):
        late.on_train_start(trainer, Foreign())


def windows_of(given: Any, **fields: Any) -> list[torch.Tensor]:
    trainer = Trainer(**{**QUIET, "enable_checkpointing": False, "max_steps": 4, **fields})
    trainer.fit_loop._data_source.instance = given
    return [batch["input_ids"] for batch in training_windows(trainer)]


@pytest.mark.parametrize(
    ("fields", "batches"),
    [
        ({"max_steps": 3}, 3),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, 6),
        ({"max_steps": 30}, 8),  # an epoch has all
        ({"max_steps": 20, "limit_train_batches": 6}, 20),  # of every epoch others
        ({"max_steps": -1, "max_epochs": 3, "limit_train_batches": 0.5}, 12),
        ({"max_steps": -1, "max_epochs": -1}, 8),
    ],
)
def test_windows_that_will_be_seen_of_a_loader_whose_order_is_known(fields: dict[str, Any], batches: int) -> None:
    items = PackedWindows(torch.arange(160), 5)

    def fresh() -> ResumableLoader:
        return ResumableLoader(items, batch_size=4, seed=3)

    found, other = windows_of(fresh(), **fields), fresh()
    assert len(found) == batches
    each = min(8, fields.get("limit_train_batches", 8) if fields.get("limit_train_batches") != 0.5 else 4)
    for epoch in range(-(-batches // each)):
        other.ordered.set_epoch(epoch)
        for expected, batch in zip(list(other)[:each], found[epoch * each :], strict=False):
            assert torch.equal(expected["input_ids"], batch)


@pytest.mark.parametrize("limit", [0, 0.1])
def test_no_windows_are_left_to_look_up(limit: float) -> None:
    given = ResumableLoader(PackedWindows(torch.arange(160), 5), batch_size=4, seed=3)
    with pytest.raises(InputError, match=f"`trainer.limit_train_batches` must leave at least one batch, {limit} of 8"):
        windows_of(given, limit_train_batches=limit, max_steps=-1, max_epochs=1)


def test_all_windows_of_a_loader_whose_order_is_not_known_and_nothing_drawn() -> None:
    rows = [{"input_ids": row} for row in torch.arange(40).view(8, 5)]
    own = torch.Generator().manual_seed(1)
    for given in (
        DataLoader(rows, batch_size=2, shuffle=True),
        DataLoader(rows, batch_size=2, sampler=RandomSampler(rows, generator=own)),
        DataLoader(rows, batch_size=2, shuffle=True, generator=own),
    ):
        torch.manual_seed(0)
        before = own.get_state()
        found = windows_of(given, max_steps=1)
        assert sorted(int(row[0]) for batch in found for row in batch) == list(range(0, 40, 5))
        assert torch.equal(own.get_state(), before)
        drawn = torch.rand(1)
        assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(0)))


def test_a_stream_has_no_windows_to_look_up() -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            while True:
                yield {"input_ids": torch.ones(5, dtype=torch.int64)}

    with pytest.raises(InputError, match="must not be TopK unless the training loader is a DataLoader of a data set"):
        windows_of(DataLoader(Endless()))


def test_the_parts_of_the_loss_go_to_the_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Foreign(), callback(distillation=Distillation()), logger=logger, log_every_n_steps=1)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["train/distillation"]]
    assert [row["step"] for row in logged] == ["0", "1", "2", "3"]
    assert all(float(row["train/distillation"]) > 0 < float(row["train/cross_entropy"]) for row in logged)
