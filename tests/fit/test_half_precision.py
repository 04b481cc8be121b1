"""A fit of weights in half precision learns as much as one in float32."""

from pathlib import Path

import pytest
from lightning.pytorch import Trainer, seed_everything
from lit_prune.callbacks import DynamicPruningCallback

from lit_prune.calibration.windows import Calibration
from lit_prune.data.datamodule import TextDataModule
from lit_prune.evaluation.perplexity import measure
from lit_prune.fit.module import PrunableLM
from lit_prune.pruning import Wanda
from lit_prune.recover import FullFineTuning
from lit_prune.recover.layers.float32 import MasterAdamW
from tests.conftest import SMALL

ARCHITECTURE = {"model_type": "llama", **SMALL, "vocab_size": 4096}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def data(tmp_path: Path) -> TextDataModule:
    (tmp_path / "train.txt").write_text("Return the number of items in a container.\n" * 60)
    (tmp_path / "val.txt").write_text("Return the number of lines in a file.\n" * 20)
    files = {"train_files": str(tmp_path / "train.txt"), "val_files": str(tmp_path / "val.txt")}
    return TextDataModule(**files, seq_length=16, batch_size=4)  # type: ignore[arg-type]


def perplexity(data: TextDataModule, steps: int, dtype: str) -> float:
    """The perplexity after some steps on a pruned model."""
    seed_everything(0, verbose=False)
    module = PrunableLM(architecture=ARCHITECTURE, dtype=dtype, lr=2e-4, warmup_steps=1)  # type: ignore[arg-type]
    pruning = DynamicPruningCallback(
        method=Wanda(), sparsity=0.5, recovery=FullFineTuning(), calibration=Calibration(num_samples=4, seq_length=16)
    )
    trainer = Trainer(**QUIET, max_steps=steps, enable_checkpointing=False, callbacks=[pruning])
    trainer.fit(module, data)
    assert isinstance(trainer.optimizers[0], MasterAdamW) is (dtype != "float32")
    assert module.model is not None
    assert str(module.model.dtype) == f"torch.{dtype}"
    return measure(module.model, data.val_dataloader(), "val").perplexity


def test_all_weights_learn_as_in_float32(data: TextDataModule) -> None:
    before, expected = perplexity(data, 1, "float32"), perplexity(data, 12, "float32")
    assert expected < 0.95 * before
    assert perplexity(data, 12, "bfloat16") == pytest.approx(expected, rel=0.01)
