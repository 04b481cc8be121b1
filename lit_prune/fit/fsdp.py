"""Weights sharded over processes (FSDP2): each keeps its rows of every parameter, and a block is whole while it runs.

Sharding replaces parameters by DTensors. What needs whole weights comes before it, as a cut does, or gathers them, as
an export does.
"""

from __future__ import annotations

import copy

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune import distributed
from lit_prune.errors import InputError
from lit_prune.models import structure
from lit_prune.models.families import blocks_path
from lit_prune.recover import Snapshot, freeze_zeros
from lit_prune.recover.merge import share_buffers


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shards every block of ``model`` over ``mesh``, then the rest of it, in place; all its parameters are replaced.

    Raises:
        InputError: for a family whose blocks are not known.
    """
    path = structure.record(model).get("recipe", {}).get("blocks")
    for block in model.get_submodule(blocks_path(model.config, path)).children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Returns whether parameters of ``model`` are sharded."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def begin_states(model: nn.Module, optimizer: Optimizer) -> None:
    """Initialises the states of ``optimizer``, over a sharded ``model``, to what they are before its first step.

    torch's `get_optimizer_state_dict` makes a step with zero gradients where no step was made, and counts it: a
    checkpoint of step 0 would shift Adam's bias correction by one.
    """
    if optimizer.state:
        return
    get_optimizer_state_dict(model, optimizer)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0


def check_whole(model: PreTrainedModel) -> None:
    """Raises InputError for a model that was sharded before it is cut."""
    if is_sharded(model):
        raise InputError(
            "`model` must be whole when it is cut, and was sharded already: in your LightningModule shard it only in "
            "the call of `configure_model` that comes after `setup`, as PrunableLM does."
        )


def prepare_sharded(trainer: Trainer, model: PreTrainedModel, *, freezes: bool) -> None:
    """Prepares a model that was sharded since it was cut for training, in `on_fit_start`.

    Lightning calls `configure_model`, which shards, between the callback's `setup` and this.

    Args:
        trainer: Its optimizers were just made.
        model: The LLM.
        freezes: Whether training keeps zeros, which the hooks of the former parameters did.

    Raises:
        InputError: if the model was not sharded, so that nobody would average its gradients.
    """
    if not is_sharded(model):
        raise InputError(
            "`model` must be sharded in `configure_model` under ModelParallelStrategy, and was not: do so in the call "
            "that comes after `setup`, by `lit_prune.fit.fsdp.shard(self.model, self.device_mesh['data_parallel'])`."
        )
    if freezes:
        freeze_zeros(model)
    for optimizer in trainer.optimizers:
        begin_states(trainer.lightning_module, optimizer)


def gathered(model: PreTrainedModel) -> PreTrainedModel | None:
    """Returns a whole copy of a sharded model on the CPU of the first process, None in the others.

    All processes must take part. A whole model is returned as it is.
    """
    if not is_sharded(model):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not distributed.is_rank_zero():
        return None
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=model.dtype)
    Snapshot.of(model).rebuild(whole)
    whole.load_state_dict(state, assign=True)
    share_buffers(model, whole)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole.train(model.training)
