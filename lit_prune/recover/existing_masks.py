"""Masks of a model that was pruned before this run, and the checks that training keeps them.

The masks are known from the model's record; without one, zeros may be the mask of another tool, which writes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import InputError
from lit_prune.masks.zeros import MASK_SHARE, pruned_blocks, share_of_zeros, zeros
from lit_prune.models import structure
from lit_prune.models.families import blocks_path, find_blocks, has_blocks
from lit_prune.models.quantised import quantisation
from lit_prune.progress import log
from lit_prune.recover import LoRA, Recovery, adapter_config, train_adapter
from lit_prune.recover.merge import without_adapter

EARLIER_CUT_SHARE = 0.05  # share of zeros of a linear above which an earlier cut of a masked model may have made them


def take_zeros(
    model: PreTrainedModel, keep: bool | None, recovery: Recovery | None, *, blocks: str | None = None
) -> None:
    """Records the zeros of a model without a record as its mask, if ``keep`` is true or the recovery keeps zeros.

    If training would fill many zeros and ``keep`` is None, an error asks the user, since they could not be restored
    after training.

    Args:
        model: A causal LM, with or without an adapter.
        keep: Whether the zeros are a mask; None raises an error if there are many and training would fill them.
        recovery: Recovery that trains the model before the first cut; None trains the parameters that are trainable.
        blocks: Dotted path of the blocks, where they are not found by themselves.

    Raises:
        InputError: if training would fill zeros and ``keep`` is None, if ``keep`` contradicts the record or the
            recovery, or if there are no zeros to keep.
    """
    if structure.masked(model):
        if keep is False:
            raise InputError(
                "`pruning.keep_zeros` must not be false for a model whose record says that its weights are masked: "
                "masked weights stay zero."
            )
        return
    if quantisation(model) is not None:
        if keep:
            raise InputError(
                "`pruning.keep_zeros` must be null for a quantised model without a record: rounding makes zeros too, "
                "which cannot be told from pruned weights. LoRA leaves all of them unchanged."
            )
        return
    share = _zero_share(model, blocks)
    if keep is None or (keep is False and share >= MASK_SHARE):
        keep = _keeps_zeros(share, keep, recovery, trains=_trains(model, recovery))
    if not keep:
        return
    blocks_path(model, blocks)  # raises for an unknown family, whose zeros the export could not count
    if share == 0:
        raise InputError("`pruning.keep_zeros` must be null for a model that has no zeros in its linears.")
    log(f"{share:.1%} of the weights of the linears are zero, without a record of pruning: they are kept as a mask.")
    recipe = {"blocks": blocks} if blocks else {}
    structure.write(model, masked=True, **({"recipe": recipe} if recipe else {}))


def _keeps_zeros(share: float, keep: bool | None, recovery: Recovery | None, *, trains: bool) -> bool:
    """Returns whether zeros are kept if the user did not ask for it; raises InputError if the user has to decide."""
    keeps_zeros = recovery is not None and recovery.merge_keeps_zeros
    if keep is False and keeps_zeros:
        raise InputError(f"`pruning.keep_zeros` must not be false with {recovery}, which keeps zeros; use LoRA.")
    if keep is False or share < MASK_SHARE or not trains:
        return False
    if not keeps_zeros:
        raise InputError(
            f"`pruning.keep_zeros` must be given: {share:.1%} of the weights of the linears are zero, without a record "
            "of pruning, and training or merging would fill them. true keeps them as a mask, false does not."
        )
    return True


def _trains(model: PreTrainedModel, recovery: Recovery | None) -> bool:
    return recovery is not None or any(parameter.requires_grad for parameter in model.parameters())


def _zero_share(model: PreTrainedModel, blocks: str | None) -> float:
    """Returns the share of zeros in the linears of the blocks, or for an unknown family in all linears but the head."""
    if blocks is None and not has_blocks(model):
        zero, size = zeros(_linears(model))
        return zero / max(1, size)
    return share_of_zeros(find_blocks(without_adapter(model), blocks=blocks, quantised=True))


def _linears(model: PreTrainedModel) -> Iterator[Tensor]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and ".lora_" not in name:
            yield module.weight.detach()


def check_kept(model: PreTrainedModel, recovery: Recovery | None) -> None:
    """Checks that ``recovery`` can train ``model`` without a cut.

    Raises:
        InputError: if the recovery does not fit the model, would fill its masks, or differs from its adapter.
    """
    adapter = adapter_config(model)
    if (
        quantisation(model) is not None
        and adapter is None
        and _trains(model, recovery)
        and not isinstance(recovery, LoRA)
    ):
        raise InputError(
            f"`pruning.recovery` must be LoRA for a model whose linears are quantised, got {recovery or 'null'}; for "
            "another recovery, start from the model in full precision."
        )
    if recovery is None:
        check_unfilled(model, "recovery", "MaskedLoRA, FullFineTuning or LoRA")
        if adapter is None or any(parameter.requires_grad for parameter in model.parameters()):
            return
    elif adapter is None:
        recovery.check(model)
    if adapter is not None and not _same_adapter(adapter, recovery):
        raise InputError(
            f"`pruning.recovery` must be the adapter in the folder `model.pretrained`, LoRA(r={adapter['r']}, "
            f"alpha={adapter['lora_alpha']}, dropout={adapter['lora_dropout']}), whose training continues, got "
            f"{'null' if recovery is None else recovery}: merging it first would fill masked weights."
        )


def check_unfilled(model: PreTrainedModel, field: str, others: str) -> None:
    """Checks that training without a recovery, of whatever the LightningModule leaves trainable, fills no mask.

    Args:
        model: The causal LM.
        field: The field that is null, `recovery` or `before`.
        others: The recoveries to suggest in the message.

    Raises:
        InputError: if training would fill masked weights.
    """
    if structure.masked(model) and _fills(model):
        raise InputError(
            f"`pruning.{field}` must be given for a model with masks, or training fills their zeros: use {others}, or "
            "freeze the LLM in your LightningModule."
        )


def _fills(model: PreTrainedModel) -> bool:
    """Returns whether a linear with masked weights is trainable.

    The record lists the targets of the last cut only; linears of earlier cuts are recognised by their many zeros.
    """
    if adapter_config(model) is not None:
        return False
    recorded = {id(linear.parameter) for block in pruned_blocks(model) for linear in block.linears.values()}
    blocks = find_blocks(model, blocks=(structure.record(model).get("recipe") or {}).get("blocks"), quantised=True)
    return any(
        linear.parameter.requires_grad
        and (id(linear.parameter) in recorded or linear.pruned >= EARLIER_CUT_SHARE * linear.size)
        for block in blocks
        for linear in block.linears.values()
    )


def _same_adapter(adapter: dict[str, Any], recovery: Recovery | None) -> bool:
    """Returns whether ``recovery`` would attach the same adapter; if its `target_modules` is None, any matches."""
    if not isinstance(recovery, LoRA):
        return False
    existing = {field: adapter[field] for field in ("r", "lora_alpha", "lora_dropout")}
    wanted = {"r": recovery.r, "lora_alpha": recovery.alpha, "lora_dropout": recovery.dropout}
    targets = recovery.target_modules
    return existing == wanted and (targets is None or sorted(targets) == sorted(adapter["target_modules"]))


def attach(model: PreTrainedModel, recovery: Recovery | None) -> None:
    """Prepares ``model`` for training by ``recovery``, in place; an adapter that it already has is trained further.

    With a quantised base the adapter is exported unmerged, since merging would change the type of the weights.
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
