"""Weights sharded over processes (FSDP2): each keeps its rows of every parameter, and a block is whole while it runs.

Sharding puts DTensors in the place of parameters. What needs whole weights comes before, as a cut does, or gathers
them, as an export does.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune import distributed
from lit_prune.models import structure
from lit_prune.models.families import blocks_path
from lit_prune.recover import Snapshot
from lit_prune.recover.merge import share_buffers


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shards every block of ``model`` over ``mesh``, and then the rest of it, in place; its parameters are others then.

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
    """Makes the states of ``optimizer``, over a sharded ``model``, what they are before its first step.

    torch, asked for the states of an optimizer that made no step, makes one with gradients of zero, and counts it: a
    checkpoint of step 0 would move Adam's correction of its averages by one.
    """
    if optimizer.state:
        return
    get_optimizer_state_dict(model, optimizer)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0


def gathered(model: PreTrainedModel) -> PreTrainedModel | None:
    """Returns a whole copy of a sharded model on the CPU of the first process, None in the others.

    All processes have to take part. A model that is whole is returned as it is.
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
