from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lit_prune.callbacks import DynamicPruningCallback

from lit_prune.calibration.windows import Calibration
from lit_prune.data.datamodule import TextDataModule
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.fit.module import PrunableLM
from lit_prune.pruning import Wanda
from lit_prune.recover import MaskedLoRA
from tests.conftest import SMALL

ARCHITECTURE = {"model_type": "llama", **SMALL, "vocab_size": 4096}
TRAINER = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture
def data(tmp_path: object) -> TextDataModule:
    from pathlib import Path

    folder = Path(str(tmp_path))
    (folder / "train.txt").write_text("Return the number of items in a container.\n" * 60)
    (folder / "val.txt").write_text("Open the file and read its lines, one after the other.\n" * 20)
    return TextDataModule(
        train_files=str(folder / "train.txt"), val_files=str(folder / "val.txt"), seq_length=16, batch_size=4
    )


def fit(module: PrunableLM, data: TextDataModule, **fields: object) -> Trainer:
    trainer = Trainer(**{**TRAINER, "enable_model_summary": False, "max_steps": 5, **fields})
    trainer.fit(module, data)
    return trainer


def test_a_fresh_model_learns_and_logs_its_perplexity(data: TextDataModule) -> None:
    torch.manual_seed(0)
    module = PrunableLM(architecture=ARCHITECTURE, lr=1e-2, warmup_steps=1)
    fit(module, data, max_steps=1)
    trainer = fit(module, data, max_steps=20)
    metrics = trainer.validate(module, data, verbose=False)
    assert metrics[0]["val/perplexity"] < 2000  # a uniform guess gives 4096
    assert module.model is not None
    expected = measure(module.model, data.val_dataloader(), "val").perplexity
    assert metrics[0]["val/perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_perplexity_is_summed_in_full_precision_where_the_weights_are_not(data: TextDataModule, precision: str) -> None:
    module = PrunableLM(architecture=ARCHITECTURE)
    trainer = Trainer(**TRAINER, enable_model_summary=False, precision=precision)
    found = trainer.validate(module, data, verbose=False)[0]["val/perplexity"]
    assert module.model is not None
    assert found == pytest.approx(measure(module.model, data.val_dataloader(), "val").perplexity, rel=1e-5)
    assert found == pytest.approx(4096, rel=0.2)


def test_configure_model_is_idempotent() -> None:
    module = PrunableLM("embedded")
    assert module.model is None
    module.configure_model()
    first = module.model
    module.configure_model()
    assert module.model is first


def test_padding_is_left_out_of_the_loss() -> None:
    module = PrunableLM(architecture=ARCHITECTURE)
    module.configure_model()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    ids = torch.randint(1, 64, (1, 8))
    padded = {"input_ids": torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)}
    padded["attention_mask"] = (torch.arange(12)[None] < 8).long()
    module.eval()
    torch.testing.assert_close(module.training_step(padded, 0), module.training_step({"input_ids": ids}, 0))


class Rates(Callback):
    """Notes the learning rate of every step, as the optimizer makes it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, *args: object) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_warm_up_and_cosine_cover_the_run(data: TextDataModule) -> None:
    module, rates = PrunableLM(architecture=ARCHITECTURE, lr=1e-3, warmup_steps=2, min_lr_share=0.1), Rates()
    fit(module, data, max_steps=10, callbacks=[rates])
    assert rates.seen[:2] == pytest.approx([5e-4, 1e-3])  # no step is made with a rate of 0
    assert max(rates.seen) == rates.seen[1]
    assert rates.seen[-1] == pytest.approx(1e-4)


def test_warm_up_and_cosine_begin_anew_at_a_cut_and_cover_what_remains(data: TextDataModule) -> None:
    module, rates = PrunableLM(architecture=ARCHITECTURE, lr=1e-3, warmup_steps=2, min_lr_share=0.1), Rates()
    calibration = Calibration(num_samples=2, seq_length=16)
    pruning = DynamicPruningCallback(Wanda(), at_step=4, recovery=MaskedLoRA(), calibration=calibration)
    fit(module, data, max_steps=12, callbacks=[pruning, rates])
    alone, others = PrunableLM(architecture=ARCHITECTURE, lr=1e-3, warmup_steps=2, min_lr_share=0.1), Rates()
    fit(alone, data, max_steps=8, callbacks=[others])
    assert rates.seen[4:] == pytest.approx(others.seen)  # eight steps remain
    assert rates.seen[3] != pytest.approx(rates.seen[4])
    fit(module, data, max_steps=1)  # another fit begins at 0
    assert module._optimizer_step == 0


@pytest.mark.parametrize(("given", "first"), [(None, [1 / 10, 1 / 2, 1 / 4]), (5, [1 / 5, 1 / 5, 1 / 5])])
def test_warm_up_is_a_tenth_of_the_steps_until_the_next_cut(given: int | None, first: list[float]) -> None:
    module = PrunableLM(architecture=ARCHITECTURE, lr=1.0, warmup_steps=given)
    module.configure_model()
    pruning = DynamicPruningCallback(Wanda(), at_step=[100, 120], recovery=MaskedLoRA())
    rates = []
    for step in (0, 100, 120):  # before the cuts, between them, and after: 100, 20 and 40 steps
        module._trainer = SimpleNamespace(
            global_step=step, estimated_stepping_batches=160, callbacks=[Rates(), pruning]
        )  # type: ignore[assignment]
        rates.append(module.configure_optimizers()["optimizer"].param_groups[0]["lr"])
    assert rates == pytest.approx(first)


def test_vectors_have_no_weight_decay(data: TextDataModule) -> None:
    module = PrunableLM(architecture=ARCHITECTURE, weight_decay=0.1)
    trainer = fit(module, data, max_steps=1)
    decays = {g["weight_decay"]: {p.ndim for p in g["params"]} for g in trainer.optimizers[0].param_groups}
    assert decays == {0.1: {2}, 0.0: {1}}


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = PrunableLM(architecture=ARCHITECTURE, gradient_checkpointing=checkpointing)
        module.configure_model()
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        module.train()
        module.training_step({"input_ids": torch.arange(1, 17)[None]}, 0).backward()
        assert module.model is not None
        assert module.model.model.layers[0].gradient_checkpointing is checkpointing
        gradients.append(module.model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "`model.lr` must be above 0"),
        ({"warmup_steps": -1}, "`model.warmup_steps` must be at least 0"),
        ({"pretrained": "./none"}, "no such file or folder"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PrunableLM(**fields)  # type: ignore[arg-type]


def test_a_checkpoint_and_weights_on_disk_are_refused_together() -> None:
    with pytest.raises(InputError, match="`model.on_disk` must be false with a checkpoint"):
        PrunableLM(on_disk=True).on_load_checkpoint({})
