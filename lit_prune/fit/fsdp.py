"""Weights sharded over processes with FSDP2: each holds its rows of every parameter; a block is gathered while it runs.

Sharding replaces parameters by DTensors. A cut, which needs whole weights, is made before it; the export gathers them.
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
from lit_prune.models.custom_code import runs_custom_code
from lit_prune.models.families import blocks_path
from lit_prune.recover import Snapshot, freeze_zeros
from lit_prune.recover.merge import share_buffers


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shards every block of ``model`` over ``mesh``, then the rest of it, in place; all its parameters are replaced.

    Raises:
        InputError: for an unknown family.
    """
    path = structure.record(model).get("recipe", {}).get("blocks")
    for block in model.get_submodule(blocks_path(model, path)).children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Returns whether parameters of ``model`` are sharded."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def initialise_states(model: nn.Module, optimizer: Optimizer) -> None:
    """Initialises the states of ``optimizer``, of a sharded ``model``, with a step count of 0.

    torch's `get_optimizer_state_dict` initialises empty states by a step with zero gradients, and counts it: resuming
    from a checkpoint of step 0 would shift Adam's bias correction by one.
    """
    if optimizer.state:
        return
    get_optimizer_state_dict(model, optimizer)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0


def check_unsharded(model: PreTrainedModel) -> None:
    """Raises InputError for a model that was sharded before it is cut."""
    if is_sharded(model):
        raise InputError(
            "`model` must not be sharded before it is cut, got DTensors: in your LightningModule shard it only in the "
            "call of `configure_model` that comes after `setup`, as PrunableLM does."
        )


def prepare_sharded(trainer: Trainer, model: PreTrainedModel, *, freezes: bool) -> None:
    """Prepares a model for training that was sharded after its cut; call it in `on_fit_start`.

    Lightning calls `configure_model`, which shards the model, after the callback's `setup`, which cuts it, and makes
    the optimizers right before `on_fit_start`.

    Args:
        trainer: The Trainer, whose optimizers are made.
        model: The LLM.
        freezes: Whether training keeps zeros. Its gradient hooks were lost with the parameters that sharding replaced.

    Raises:
        InputError: if the model was not sharded, so that its gradients would not be averaged over the processes.
    """
    if not is_sharded(model):
        raise InputError(
            "`model` must be sharded in `configure_model` under ModelParallelStrategy, got whole weights: in the call "
            "after `setup` run `lit_prune.fit.fsdp.shard(self.model, self.device_mesh['data_parallel'])`."
        )
    if freezes:
        freeze_zeros(model)
    for optimizer in trainer.optimizers:
        initialise_states(trainer.lightning_module, optimizer)


def gathered(model: PreTrainedModel) -> PreTrainedModel | None:
    """Returns an unsharded copy of a sharded model, on the CPU of the first process; None in the other processes.

    All processes must call it. A model that is not sharded is returned itself.
    """
    if not is_sharded(model):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not distributed.is_rank_zero():
        return None
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), dtype=model.dtype, trust_remote_code=runs_custom_code(model)
        )
    Snapshot.of(model).rebuild(whole)
    whole.load_state_dict(state, assign=True)
    share_buffers(model, whole)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole.train(model.training)
