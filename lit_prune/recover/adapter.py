"""Low-rank adapters by peft: checks of their settings, the linears that can have one, adding and merging them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import InputError
from lit_prune.models import structure
from lit_prune.models.families import blocks_path, has_blocks
from lit_prune.models.linears import has_fused_experts, linears_of
from lit_prune.models.quantised import Linear4bit, Linear8bit, dequantised, is_quantised
from lit_prune.recover.layers.float32 import Float32Linear
from lit_prune.recover.layers.masked_linear import MaskedLayer, MaskedLinear
from lit_prune.recover.layers.masked_quantised import MaskedQuantised

# Families whose kernels multiply by the weight of out_proj without calling the module, so that peft refuses an adapter
MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})


class Settings(Protocol):
    """The settings of a recovery by a low-rank adapter; see LoRA."""

    @property
    def r(self) -> int:
        """Rank."""

    @property
    def alpha(self) -> int:
        """Numerator of the scale alpha / r."""

    @property
    def dropout(self) -> float:
        """Dropout probability, in [0, 1)."""

    @property
    def target_modules(self) -> list[str] | None:
        """Name suffixes of the linears that get an adapter; None selects all that can have one."""


def check_settings(settings: Settings) -> None:
    """Raises InputError for a rank below 1 or a dropout outside [0, 1)."""
    name = type(settings).__name__
    if settings.r < 1:
        raise InputError(f"`{name}.r` must be at least 1, got {settings.r}.")
    if not 0 <= settings.dropout < 1:
        raise InputError(f"`{name}.dropout` must be in [0, 1), got {settings.dropout}.")


def check_targets(settings: Settings, model: PreTrainedModel) -> None:
    """Raises InputError for target modules that match no linear that can have an adapter."""
    linears = _adaptable(model)
    for target in settings.target_modules or []:
        if not any(_is_target(name, [target]) for name in linears):
            raise InputError(
                f"`{type(settings).__name__}.target_modules` must match linears of the model, got {target!r}; there "
                f"are {', '.join(sorted(_last_names(linears)))}{_without_adapter(model, target)}."
            )


def check_detach(settings: Settings, model: PreTrainedModel) -> None:
    """Raises InputError for an adapter on a tied head, which cannot be merged in place: the embedding would change."""
    head = _name_of_head(model)
    if head is None or not has_tied_head(model) or not _is_target(head, settings.target_modules or []):
        return
    raise InputError(
        f"`{type(settings).__name__}.target_modules` must not have the head, {head}, if a cut comes afterwards: "
        "it is tied to the embedding, which a merge would change too. Train it after the last cut only."
    )


def has_tied_head(model: PreTrainedModel) -> bool:
    """Returns whether the head and the embedding of ``model`` are one parameter, with or without an adapter."""
    head, embedding = (_weight(module) for module in (model.get_output_embeddings(), model.get_input_embeddings()))
    return head is not None and head is embedding


def trains_tied_head(model: PreTrainedModel) -> bool:
    """Returns whether ``model`` has an adapter on a head that is tied to the embedding."""
    return isinstance(model.get_output_embeddings(), LoraLayer) and has_tied_head(model)


def _weight(module: Any) -> Tensor | None:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return getattr(base, "weight", None)


def _without_adapter(model: PreTrainedModel, target: str) -> str:
    """The reason why linears called ``target`` get no adapter, if there is one."""
    if model.config.model_type in MAMBA and target.endswith("out_proj"):
        return "; the kernels of Mamba read the weight of out_proj themselves, past an adapter"
    if has_fused_experts(decoder_blocks(model).values()):
        return "; fused experts, and linears of their names, get no adapter"
    return ""


def decoder_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns the decoder layers by their path; the whole model, by an empty one, if its blocks are not found."""
    given = structure.record(model).get("recipe", {}).get("blocks")
    if given is None and not has_blocks(model):
        return {"": model}
    path = blocks_path(model, given)
    return {f"{path}.{name}": block for name, block in model.get_submodule(path).named_children()}


def lora_config(settings: Settings, model: PreTrainedModel) -> LoraConfig:
    """Returns peft's config of the adapter for ``model``; without target modules, the linears of the blocks get one."""
    linears, head = _adaptable(model), _name_of_head(model)
    targets = settings.target_modules
    if targets is None:
        targets = sorted(_last_names([name for name in linears if name != head]))
    every = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    others = [name for name in every if name not in linears and _is_target(name, targets)]
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        exclude_modules=others or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )


def add_adapter(model: PreTrainedModel, config: PeftConfig, *, masked: bool = False) -> None:
    """Adds an adapter in float32 to ``model`` in place, and freezes everything else.

    Args:
        model: A causal LM without an adapter.
        config: peft's config; a LoraConfig if ``masked``.
        masked: Whether the adapter preserves zeros; see ``masked_linear``, and ``masked_quantised`` for quantised ones.
    """
    if masked:
        assert isinstance(config, LoraConfig)
        # peft uses the first entry that matches by isinstance, and bitsandbytes' linears are instances of nn.Linear
        quantised = {Linear4bit: MaskedQuantised, Linear8bit: MaskedQuantised}
        config._register_custom_module({**quantised, nn.Linear: MaskedLinear, Conv1D: MaskedLinear})
    with warnings.catch_warnings():  # of complications when a tied head is merged, which `merge.merged` unties
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        model.add_adapter(config)
    _keep_float32(model)
    config.base_model_name_or_path = None  # peft enters the dense model, whose weights are not the pruned ones
    model.train(model.training)  # peft's new dropout layers are in training mode, whatever the mode of the model


def _keep_float32(model: nn.Module) -> None:
    """Casts the factors A and B of all adapters to float32, in which they stay when the model is cast.

    ``get_peft_model`` casts them as well (`autocast_adapter_dtype`), but ``add_adapter`` of transformers leaves them in
    the type of the base layer: in half precision most updates of A and B round to nothing, and in float16 the second
    moments of Adam underflow as well, so that its steps become infinite.
    """
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        for factors in (layer.lora_A, layer.lora_B):
            for name, linear in factors.items():
                if type(linear) is nn.Linear:
                    factors[name] = Float32Linear.from_linear(linear)


def train_adapter(model: PreTrainedModel) -> None:
    """Makes the adapter that ``model`` was loaded with trainable, in float32, and freezes everything else."""
    _keep_float32(model)
    for config in model.peft_config.values():
        config.inference_mode, config.base_model_name_or_path = False, None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def adapter_config(model: PreTrainedModel) -> dict[str, Any] | None:
    """Returns the config of the adapter on ``model``, JSON-serialisable; None without an adapter."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return None
    fields: dict[str, Any] = model.peft_config["default"].to_dict()  # type: ignore[attr-defined]
    return json.loads(json.dumps(fields, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def has_masked_adapter(model: nn.Module) -> bool:
    """Returns whether the adapter on ``model`` preserves zeros, so that it can be merged into masked weights."""
    return any(isinstance(module, MaskedLayer) for module in model.modules())


@torch.no_grad()
def merged_weight(layer: LoraLayer) -> Tensor:
    """Returns the sum of the base layer's weight and its adapter, in the weight's layout and data type.

    Plain LoRA fills every zero, a masked adapter none. A quantised weight is dequantised, (out, in).
    """
    if isinstance(layer, MaskedLayer):
        return layer.merged_weight()
    adapted: Any = layer
    base, delta = adapted.get_base_layer(), adapted.get_delta_weight("default")
    weight = dequantised(base) if is_quantised(base) else base.weight
    sum_dtype = torch.promote_types(weight.dtype, torch.float32)  # a sum in half precision would lose small updates
    return (weight.to(sum_dtype) + delta.to(weight.device, sum_dtype)).to(weight.dtype)


@torch.no_grad()
def merge_adapter(model: PreTrainedModel) -> None:
    """Merges the adapter of ``model`` into its weights and removes it, in place; does nothing without an adapter."""
    if adapter_config(model) is None:
        return
    assert has_masked_adapter(model) or not structure.masked(model), "B A is dense, and would fill the zeros"
    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        layer.get_base_layer().weight.copy_(merged_weight(layer))
        model.set_submodule(name, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config


def _adaptable(model: PreTrainedModel) -> set[str]:
    """Returns the names of the linears that can have an adapter: those of the blocks, but for routers, and the head.

    Linears of a vision tower are none of them.
    """
    blocks, head = decoder_blocks(model), _name_of_head(model)
    linears = {
        ".".join(part for part in (path, name) if part)
        for path, block in blocks.items()
        for name, linear in linears_of(block).items()
        if isinstance(linear.module, (nn.Linear, Conv1D))
    }
    linears |= {head} if head else set()
    if model.config.model_type in MAMBA:
        linears = {name for name in linears if not name.endswith("out_proj")}
    if not has_fused_experts(blocks.values()):
        return linears
    # In a mixture of experts peft applies the names gate_proj, up_proj and down_proj to the fused experts, even in
    # blocks with a plain MLP, and its adapter for experts computes the full matrix B A of every expert in each step.
    return {name for name in linears if not name.endswith(("gate_proj", "up_proj", "down_proj")) and name != head}


def _name_of_head(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def _is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether peft gives the module ``name`` an adapter."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _last_names(names: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}
