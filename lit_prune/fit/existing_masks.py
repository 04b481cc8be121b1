"""The masks of a model that was pruned before this run, by its record or by its zeros, and how training keeps them.

A record says that weights were pruned; zeros without one may be the mask of another tool, which writes no record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import InputError
from lit_prune.masks.zeros import pruned_blocks, share_of_zeros, zeros
from lit_prune.models import structure
from lit_prune.models.families import blocks_path, find_blocks, is_known
from lit_prune.models.quantised import quantisation
from lit_prune.progress import log
from lit_prune.recover import LoRA, Recovery, adapter_config, train_adapter
from lit_prune.recover.merge import without_adapter

NOTICEABLE = 0.05  # share of zeros in the linears that no dense model has


def take_zeros(
    model: PreTrainedModel, keep: bool | None, recovery: Recovery | None, *, blocks: str | None = None
) -> None:
    """Takes the zeros of a model without a record as its mask where ``keep`` says so, and writes that into the record.

    Training that would fill them is refused unless ``keep`` is False: nobody can restore them after hours of training,
    and an answer costs one word before the first step. A recovery that keeps zeros anyway needs no answer.

    Args:
        model: A causal LM, perhaps with an adapter.
        keep: Whether its zeros are a mask; None refuses where there are many.
        recovery: What is trained before anything is cut; None trains what is trainable.
        blocks: Dotted path of the blocks, for a family that is not known.

    Raises:
        InputError: if training would fill zeros that nobody has answered for, if ``keep`` contradicts the record or the
            recovery, or if there are no zeros to keep.
    """
    if structure.masked(model):
        if keep is False:
            raise InputError(
                "`pruning.keep_zeros` must not be false for a model whose record says that its weights are masked: its "
                "zeros are kept."
            )
        return
    if quantisation(model) is not None:
        if keep:
            raise InputError(
                "`pruning.keep_zeros` must be null for a model whose linears are quantised and that has no record: "
                "rounding made zeros too, and nothing says which were pruned. LoRA leaves all of them as they are."
            )
        return
    share = _zero_share(model, blocks)
    if keep is None or (keep is False and share >= NOTICEABLE):
        keep = _answer(share, keep, recovery, trains=_trains(model, recovery))
    if not keep:
        return
    blocks_path(model.config, blocks)  # raises for an unknown family: the export counts zeros in its blocks
    if share == 0:
        raise InputError("`pruning.keep_zeros` must be null for a model that has no zeros in its linears.")
    log(f"{share:.1%} of the weights of the linears are zero, and no record says why: they are kept as a mask.")
    recipe = {"blocks": blocks} if blocks else {}
    structure.write(model, masked=True, **({"recipe": recipe} if recipe else {}))


def _answer(share: float, keep: bool | None, recovery: Recovery | None, *, trains: bool) -> bool:
    """Returns whether zeros are kept where the user did not ask for it."""
    keeps_zeros = recovery is not None and recovery.merge_keeps_zeros
    if keep is False and keeps_zeros:
        raise InputError(f"`pruning.keep_zeros` must not be false with {recovery}, which keeps zeros; use LoRA.")
    if keep is False or share < NOTICEABLE or not trains:
        return False
    if not keeps_zeros:
        raise InputError(
            f"`pruning.keep_zeros` must be given: {share:.1%} of the weights of the linears are zero, no record says "
            "why, and training or merging would fill them. true keeps them as a mask, false lets them be filled."
        )
    return True


def _trains(model: PreTrainedModel, recovery: Recovery | None) -> bool:
    return recovery is not None or any(parameter.requires_grad for parameter in model.parameters())


def _zero_share(model: PreTrainedModel, blocks: str | None) -> float:
    """Returns the share of zeros in the linears of the blocks; in all but the head where the blocks are not known."""
    if blocks is None and not is_known(model.config):
        zero, size = zeros(_linears(model))
        return zero / max(1, size)
    return share_of_zeros(find_blocks(without_adapter(model), blocks=blocks, quantised=True))


def _linears(model: PreTrainedModel) -> Iterator[Tensor]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and ".lora_" not in name:
            yield module.weight.detach()


def check_kept(model: PreTrainedModel, recovery: Recovery | None) -> None:
    """Checks that ``recovery`` can train ``model`` as it is.

    Raises:
        InputError: if it does not fit, if training would fill a mask, or if the model has another adapter.
    """
    adapter = adapter_config(model)
    if (
        quantisation(model) is not None
        and adapter is None
        and _trains(model, recovery)
        and not isinstance(recovery, LoRA)
    ):
        raise InputError(
            f"`pruning.recovery` must be LoRA for a model whose linears are quantised, which is trained beside them, "
            f"got {recovery or 'null'}; for another begin with the folder in full precision."
        )
    if recovery is None:
        check_unfilled(model, "recovery", "MaskedLoRA, FullFineTuning or LoRA")
        if adapter is None or any(parameter.requires_grad for parameter in model.parameters()):
            return
    elif adapter is None:
        recovery.check(model)
    if adapter is not None and not _same_adapter(adapter, recovery):
        raise InputError(
            f"`pruning.recovery` must be the adapter that lies in `model.pretrained`, LoRA(r={adapter['r']}, "
            f"alpha={adapter['lora_alpha']}, dropout={adapter['lora_dropout']}), which is trained on then, got "
            f"{'null' if recovery is None else recovery}: over masks it cannot be merged to make room for another."
        )


def check_unfilled(model: PreTrainedModel, field: str, others: str) -> None:
    """Checks that masks last where the parameters are trained that the LightningModule leaves trainable.

    Args:
        model: The causal LM.
        field: The field that is null: `recovery` or `before`.
        others: The recoveries that may be given instead.

    Raises:
        InputError: if training would fill them.
    """
    if structure.masked(model) and _fills(model):
        raise InputError(
            f"`pruning.{field}` must be given for a model with masks, or training fills their zeros: use {others}, or "
            "freeze the LLM yourself."
        )


def _fills(model: PreTrainedModel) -> bool:
    """Returns whether a linear with zeros is trained.

    An earlier cut may have had other `targets` than the record has: its linears are known by their many zeros.
    """
    if adapter_config(model) is not None:
        return False
    recorded = {id(linear.parameter) for block in pruned_blocks(model) for linear in block.linears.values()}
    blocks = find_blocks(model, blocks=(structure.record(model).get("recipe") or {}).get("blocks"), quantised=True)
    return any(
        linear.parameter.requires_grad
        and (id(linear.parameter) in recorded or linear.pruned >= NOTICEABLE * linear.size)
        for block in blocks
        for linear in block.linears.values()
    )


def _same_adapter(adapter: dict[str, Any], recovery: Recovery | None) -> bool:
    """Returns whether ``recovery`` would attach the same adapter; null `target_modules` match any."""
    if not isinstance(recovery, LoRA):
        return False
    existing = {field: adapter[field] for field in ("r", "lora_alpha", "lora_dropout")}
    wanted = {"r": recovery.r, "lora_alpha": recovery.alpha, "lora_dropout": recovery.dropout}
    targets = recovery.target_modules
    return existing == wanted and (targets is None or sorted(targets) == sorted(adapter["target_modules"]))


def attach(model: PreTrainedModel, recovery: Recovery | None) -> None:
    """Prepares ``model`` to be trained by ``recovery``; an adapter that the model already has is trained further.

    Beside weights that came quantised the adapter is exported unmerged, since merging would change their type.
    """
    if recovery is None:
        return
    if quantisation(model) is not None:
        structure.write(model, form="adapter")
    if adapter_config(model) is None:
        recovery.attach(model)
    else:
        train_adapter(model)
    structure.write(model, recovery=repr(recovery))
