"""A fit of weights in half precision learns as much as one in float32, in one process and in two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lit_prune.callbacks import DynamicPruningCallback
from torch import Tensor, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.calibration.windows import Calibration
from lit_prune.data.datamodule import TextDataModule
from lit_prune.evaluation.perplexity import measure
from lit_prune.fit.fsdp import initialise_states, shard
from lit_prune.fit.module import PrunableLM
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude, Wanda
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, freeze_zeros
from lit_prune.recover.layers.float32 import MasterAdamW
from tests.conftest import SMALL, small_model
from tests.masks.test_freeze import zero_weights

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


def half_model() -> PreTrainedModel:
    model = small_model().bfloat16()
    prune(model, [torch.ones(1, 2).long()] * 2, Recipe(Magnitude(), 0.5, Uniform()))
    FullFineTuning().attach(model)
    return model


def optimizer_of(model: nn.Module) -> MasterAdamW:
    return MasterAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def take_steps(model: nn.Module, optimizer: MasterAdamW, windows: slice, seed: int) -> None:
    """Two steps, on some of the four windows of each."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(2):
        ids = torch.randint(1, 64, (4, 16), generator=random)[windows]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def replicated(windows: slice) -> dict[str, Tensor]:
    """The weights after four steps under DDP."""
    model = half_model()
    wrapped = DistributedDataParallel(model)
    optimizer = optimizer_of(wrapped)
    take_steps(wrapped, optimizer, windows, seed=1)
    take_steps(wrapped, optimizer, windows, seed=2)
    return model.state_dict()


def sharded(windows: slice, *, resumes: bool) -> dict[str, Tensor]:
    """The weights after four steps under FSDP2; with ``resumes`` a second optimizer takes over after two of them."""
    model = half_model()
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    freeze_zeros(model)
    optimizer = optimizer_of(model)
    initialise_states(model, optimizer)
    take_steps(model, optimizer, windows, seed=1)
    if resumes:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        stored = get_optimizer_state_dict(model, optimizer, options=whole)
        optimizer = optimizer_of(model)
        from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(model, optimizer, stored, options=from_first)
        assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    take_steps(model, optimizer, windows, seed=2)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def train_in_two(rank: int, folder: str) -> None:
    """The work of one of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    windows = slice(2 * rank, 2 * rank + 2)
    ends = {
        "DDP": replicated(windows),
        "FSDP2": sharded(windows, resumes=False),
        "FSDP2, resumed": sharded(windows, resumes=True),
    }
    if rank == 0:
        torch.save(ends, Path(folder) / "ends.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_as_one_does(tmp_path: Path) -> None:
    multiprocessing.spawn(train_in_two, (str(tmp_path),), nprocs=2)
    model = half_model()
    before, gone = {name: tensor.clone() for name, tensor in model.state_dict().items()}, zero_weights(model)
    optimizer = optimizer_of(model)
    take_steps(model, optimizer, slice(4), seed=1)
    take_steps(model, optimizer, slice(4), seed=2)
    assert all(torch.equal(parameter == 0, zero) for parameter, zero in gone.items())
    alone = model.state_dict()
    moved = max(float((alone[name] - tensor).abs().max()) for name, tensor in before.items())
    ends = torch.load(tmp_path / "ends.pt")
    for name, tensor in ends["DDP"].items():
        assert torch.equal(ends["FSDP2"][name], tensor)
        assert torch.equal(ends["FSDP2, resumed"][name], tensor)
        assert torch.equal(tensor == 0, alone[name] == 0)
        assert float((tensor - alone[name]).abs().max()) < 0.2 * moved  # gradients are averaged in bfloat16
