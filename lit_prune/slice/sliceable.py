"""The check that a model can be sliced, with the reason if it cannot."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.models import structure
from lit_prune.models.remote_code.modeling_shrunk import ShrunkCausalLM
from lit_prune.models.remote_code.modeling_sliced import SLICED, SlicedCausalLM

POST_NORM = (
    "it normalises the outputs of attention and MLP before they are added to the residual stream, and a norm with "
    "weights does not commute with a rotation of the stream"
)
SHARED = "its blocks share weights, which would require the same rotation for all of them"
REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("gemma2", "gemma3", "gemma3_text", "gemma3n_text", "olmo2", "olmo3", "glm4", "exaone4"),
        POST_NORM,
    ),
    **dict.fromkeys(("zamba", "zamba2", "albert"), SHARED),
}


def check_sliceable(model: PreTrainedModel) -> None:
    """Raises InputError for a model that cannot be sliced, with the reason."""
    if isinstance(model, SlicedCausalLM):
        raise InputError(
            "`model` must not be sliced already, a model can be sliced only once. Start from the dense model, with the "
            "final sparsity."
        )
    if isinstance(model, ShrunkCausalLM):
        raise InputError(
            "`model` must not have blocks of different sizes for Slicing, got a shrunk model: slice the dense model, "
            "or shrink it with `--pruning.allocation Uniform`, which leaves its family's own class."
        )
    _check_family(model.config)
    _check_opt(model.config)
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            "`model` must be sliced in full precision, its weights are quantised. Load it unquantised, slice it, then "
            "quantise it."
        )
    if structure.masked(model):
        raise InputError(
            "`model` must not have masks for Slicing, a rotation fills their zeros. Slice the dense model, then prune "
            "the sliced one."
        )
    _check_shared(model)


def _check_family(config: PreTrainedConfig) -> None:
    family = config.model_type
    if family in SLICED:
        return
    reason = REASONS.get(family, "its norms and linears are not described in modeling_sliced.py yet")
    raise InputError(
        f"`pruning.method` Slicing cannot slice the family {family!r}: {reason}. It slices "
        f"{', '.join(sorted(SLICED))}; masks, such as Wanda, work for {family!r}."
    )


def _check_opt(config: PreTrainedConfig) -> None:
    """Raises InputError for variants of OPT that cannot be sliced; only OPT has these config fields."""
    for field, needed, reason in (
        ("do_layer_norm_before", True, POST_NORM),
        ("word_embed_proj_dim", config.hidden_size, "its embedding and its residual stream have different widths"),
        ("_remove_final_layer_norm", False, "its head reads the stream without a norm"),
        ("layerdrop", 0.0, "a block that is dropped in training would leave the stream at the wrong width"),
    ):
        value = getattr(config, field, needed)
        if value != needed:
            raise InputError(
                f"`pruning.method` Slicing cannot slice this {config.model_type} ({field} = {value}): {reason}."
            )


def _check_shared(model: PreTrainedModel) -> None:
    layers: Any = model.get_submodule(SLICED[model.config.model_type].layer_class.layout.layers)
    owner: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise InputError(
                    f"`pruning.method` Slicing cannot slice this model: {SHARED} (blocks {owner[id(parameter)]} and "
                    f"{index}, {name})."
                )
