"""Every numeric type trains to the perplexity of float32, with adapters and optimizer in float32 or more."""

import functools

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lit_prune.allocate import Uniform
from lit_prune.evaluation.perplexity import measure
from lit_prune.evaluation.speed import Speed
from lit_prune.fit.module import PrunableLM
from lit_prune.models.load import Dtype
from lit_prune.pruning import Method, Wanda
from lit_prune.recover import LoRA, Recovery
from lit_prune.slice import Slicing
from tests.callbacks.test_dynamic_pruning import QUIET, callback
from tests.conftest import SMALL, WIDE

ARCHITECTURE = {**SMALL, **WIDE, "model_type": "llama", "num_hidden_layers": 2}
SLICING = Slicing(multiple=4)


def counting(seed: int) -> DataLoader:
    """Rows of 16 token ids, each the one before it plus 3: what a model learns in a few steps."""
    start_N1 = torch.randint(1, 60, (32, 1), generator=torch.Generator().manual_seed(seed))
    ids_NT = (start_N1 + 3 * torch.arange(16)) % 60 + 1
    return DataLoader([{"input_ids": row} for row in ids_NT], batch_size=4)


@functools.cache
def trained(
    method: Method, recovery: Recovery | None, dtype: Dtype, precision: str
) -> tuple[float, float, PrunableLM, str]:
    """Returns the perplexities before and after eight steps, the module, and the type of the first measurement."""
    torch.manual_seed(0)
    module = PrunableLM(architecture=ARCHITECTURE, dtype=dtype, lr=1e-2, warmup_steps=1)
    pruning = callback(method=method, sparsity=0.25, allocation=Uniform(), recovery=recovery)
    trainer = Trainer(**QUIET, max_steps=8, enable_checkpointing=False, callbacks=[pruning], precision=precision)
    trainer.fit(module, counting(0), counting(1))
    cut = pruning.run.done[0]
    assert module.model is not None
    assert cut.protocol is not None
    return cut.perplexity["after"], measure(module.model, counting(1), "x").perplexity, module, cut.protocol.dtype


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize(
    ("method", "recovery", "dtype", "precision", "types"),
    [
        (SLICING, LoRA(), "float16", "32-true", "float16 float32"),
        (SLICING, None, "float32", "16-true", "float16"),
        (SLICING, None, "float16", "16-mixed", "float16"),
        (Wanda(), LoRA(), "float32", "bf16-true", "bfloat16 float32"),
        (Wanda(), LoRA(), "float32", "64-true", "float64"),
    ],
)
def test_every_numeric_type_trains(
    method: Method,
    recovery: Recovery | None,
    dtype: Dtype,
    precision: str,
    types: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lit_prune.fit.cut.compare_speed", lambda _: [Speed(1.0, 1.0)] * 2)  # which takes a second
    start, expected, *_ = trained(method, recovery, "float32", "32-true")
    _, found, module, measured = trained(method, recovery, dtype, precision)
    assert {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()} == set(types.split())
    assert measured == types.split()[0]  # the cut is measured in the type that is trained
    assert start / expected > 1.01
    assert found - expected == pytest.approx(0, abs=0.1 * (start - expected))
