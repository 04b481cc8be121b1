"""Sliced causal LMs: the Hugging Face classes of models whose residual stream is narrower in every block.

This file needs torch and transformers alone, and travels with every exported folder, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` opens it where lit_prune is not installed.

A sliced model is its family's own model but for three things. Norms have no weights (they are fused into the linears
that read them) and divide by the width that the stream once had. The linears that read or write the stream are
narrower. And what passes by a branch is multiplied with a matrix, the shortcut, since before and after it the stream
has other axes (SliceGPT, ICLR 2024, arXiv 2401.15024, section 3.2).
Suffixes: B batch, T tokens, D width of the stream, O rows and I columns of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.models.phi.modeling_phi import PhiDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


@dataclass(frozen=True)
class Step:
    """One reading and writing of the residual stream: ``x @ shortcut + sum of branches(norm(x))``.

    Paths are those within the decoder layer.

    Attributes:
        norm: The norm before the branches.
        readers: Linears that read the normed stream.
        writers: Linears whose outputs are added to the stream.
        shortcut: Name of the parameter that what passes by is multiplied with.
        attention: Whether the attention is one of the branches.
        mlp: Modules of the other branch, one after the other.
        dropout: Attribute that holds the dropout of the branches' outputs, a module or a rate.
    """

    norm: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    shortcut: str
    attention: bool = False
    mlp: tuple[str, ...] = ()
    dropout: str | None = None


@dataclass(frozen=True)
class Layout:
    """Where a family's parts are: paths from the causal LM, and the steps of a decoder layer."""

    layers: str
    embeddings: tuple[str, ...]
    final_norm: str
    steps: tuple[Step, ...]


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = Layout(
    layers="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    steps=(
        Step("input_layernorm", QKV, ("self_attn.o_proj",), "attention_shortcut", attention=True),
        Step(
            "post_attention_layernorm",
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
            "mlp_shortcut",
            mlp=("mlp",),
        ),
    ),
)
PHI3 = Layout(
    layers=LLAMA.layers,
    embeddings=LLAMA.embeddings,
    final_norm=LLAMA.final_norm,
    steps=(
        Step(
            "input_layernorm",
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            "attention_shortcut",
            attention=True,
            dropout="resid_attn_dropout",
        ),
        Step(
            "post_attention_layernorm",
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
            "mlp_shortcut",
            mlp=("mlp",),
            dropout="resid_mlp_dropout",
        ),
    ),
)
OPT = Layout(
    layers="model.decoder.layers",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    steps=(
        Step(
            "self_attn_layer_norm",
            QKV,
            ("self_attn.out_proj",),
            "attention_shortcut",
            attention=True,
            dropout="dropout",
        ),
        Step(
            "final_layer_norm",
            ("fc1",),
            ("fc2",),
            "mlp_shortcut",
            mlp=("fc1", "activation_fn", "fc2"),
            dropout="dropout",
        ),
    ),
)
PHI = Layout(
    layers="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.final_layernorm",
    steps=(
        Step(
            "input_layernorm",
            (*QKV, "mlp.fc1"),
            ("self_attn.dense", "mlp.fc2"),
            "shortcut",
            attention=True,
            mlp=("mlp",),
            dropout="resid_dropout",
        ),
    ),
)


class SlicedNorm(nn.Module):
    """x / sqrt(sum of squares of x / D + eps), D the width that the stream had before it was sliced.

    Of [3, 4], once four wide, it makes [3, 4] / sqrt(25 / 4) = [1.2, 1.6].
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns the normed stream in its own data type, computed in float32 at least."""
        wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        mean_BT1 = wide_BTD.square().sum(-1, keepdim=True) / self.hidden_size
        return (wide_BTD * torch.rsqrt(mean_BT1 + self.eps)).to(x_BTD.dtype)

    def extra_repr(self) -> str:
        """Returns what ``print(model)`` shows."""
        return f"{self.hidden_size}, eps={self.eps}"


class SlicedLayer(nn.Module):
    """A decoder layer that takes the steps of its layout; mixed into a family's own layer."""

    layout: ClassVar[Layout]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns the stream behind the layer, of the next layer's width; all but the stream is given by keyword."""
        if args:
            raise TypeError(f"{type(self).__name__} takes its other arguments by keyword, got {len(args)} more.")
        for step in self.layout.steps:
            hidden_states = self.take(step, hidden_states, **kwargs)
        return hidden_states

    def take(self, step: Step, x_BTD: Tensor, **kwargs: Any) -> Tensor:
        """Returns the stream behind one step."""
        normed_BTD = self.get_submodule(step.norm)(x_BTD)
        y_BTD = x_BTD @ getattr(self, step.shortcut)
        if step.attention:
            attention: Any = self.self_attn
            y_BTD = y_BTD + self._dropped(step, attention(hidden_states=normed_BTD, **kwargs)[0])
        if step.mlp:
            fed_BTD = normed_BTD
            for name in step.mlp:
                fed_BTD = getattr(self, name)(fed_BTD)
            y_BTD = y_BTD + self._dropped(step, fed_BTD)
        return y_BTD

    def set_shortcut(self, step: Step, shortcut_KK: Tensor) -> None:
        """Sets what passes by ``step`` is multiplied with, in the data type of the layer and where that is."""
        like: Any = self.get_submodule(step.writers[0]).weight
        setattr(self, step.shortcut, nn.Parameter(shortcut_KK.to(like), requires_grad=like.requires_grad))

    def _dropped(self, step: Step, x_BTD: Tensor) -> Tensor:
        if step.dropout is None:
            return x_BTD
        dropout: Any = getattr(self, step.dropout)
        rate = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        return F.dropout(x_BTD, p=rate, training=self.training)


class SlicedCausalLM(PreTrainedModel):
    """A causal LM with the widths that ``config.slice_sizes`` gives; mixed into a family's own model.

    ``slice_sizes`` has the width that each decoder layer reads, and at its end the width that the head reads. The head
    is never tied to the embedding, which has other axes and another width.
    """

    layer_class: ClassVar[type[SlicedLayer]]

    def __init__(self, config: Any) -> None:
        sizes, layers = config.slice_sizes, config.num_hidden_layers
        if not sizes or len(sizes) != layers + 1:
            raise ValueError(f"`slice_sizes` must give {layers + 1} widths, one a layer and the head's, got {sizes}.")
        super().__init__(config)
        take_shape(self, sizes)
        self._no_split_modules = {self.layer_class.__name__}


def take_shape(model: PreTrainedModel, sizes: Sequence[int]) -> None:
    """Gives a causal LM of full width the shapes that ``sizes`` says, keeping the first rows and columns.

    The values mean nothing yet: a checkpoint's weights, or the slicing itself, come into them.
    """
    layer_class, hidden_size = sliced_class(model).layer_class, model.config.hidden_size
    layout = layer_class.layout
    for name in layout.embeddings:
        embedding: Any = model.get_submodule(name)
        set_weight(embedding, embedding.weight[:, : sizes[0]].clone())
    layers: Any = model.get_submodule(layout.layers)
    for layer, (width, following) in zip(layers, pairwise(sizes), strict=True):
        _shape_layer(layer, layer_class, hidden_size, width, following)
    head = untied_head(model)
    biased = replace_norm(model, layout.final_norm, hidden_size).bias is not None
    _shape_linear(head, columns=sizes[-1], biased=biased)
    convert_to_sliced(model, sizes)


def _shape_layer(layer: Any, kind: type[SlicedLayer], hidden_size: int, width: int, following: int) -> None:
    layer.__class__ = kind
    for step in kind.layout.steps:
        out = following if step is kind.layout.steps[-1] else width
        biased = replace_norm(layer, step.norm, hidden_size).bias is not None
        for name in step.readers:
            _shape_linear(layer.get_submodule(name), columns=width, biased=biased)
        for name in step.writers:
            _shape_linear(layer.get_submodule(name), rows=out)
        layer.set_shortcut(step, torch.eye(width, out))


def _shape_linear(linear: Any, *, rows: int | None = None, columns: int | None = None, biased: bool = False) -> None:
    bias_O, weight_OI = linear.bias, linear.weight[:rows, :columns].clone()
    if bias_O is None and biased:
        bias_O = weight_OI.new_zeros(len(weight_OI))
    set_weight(linear, weight_OI, None if bias_O is None else bias_O[:rows].clone())


def convert_to_sliced(model: PreTrainedModel, sizes: Sequence[int]) -> None:
    """Makes a model of these shapes an instance of its family's sliced class, in place, its config too."""
    kind: Any = sliced_class(model)
    vars(model.config).pop("model_type", None)  # a config that was read from a file hides its class's with its own
    model.config.__class__ = kind.config_class
    model.config.slice_sizes = list(sizes)
    model.__class__ = kind
    model._no_split_modules = {kind.layer_class.__name__}


@dataclass(frozen=True)
class NormWeights:
    """Scale and shift of a norm that was replaced, each (D,) or None."""

    weight: Tensor | None
    bias: Tensor | None


def replace_norm(parent: nn.Module, name: str, hidden_size: int) -> NormWeights:
    """Puts a :class:`SlicedNorm` in the place of a norm of ``parent``; returns what that had."""
    norm: Any = parent.get_submodule(name)
    if isinstance(norm, SlicedNorm):
        return NormWeights(None, None)
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    parent.set_submodule(name, SlicedNorm(hidden_size, eps))
    return NormWeights(norm.weight, getattr(norm, "bias", None))


def untied_head(model: PreTrainedModel) -> nn.Module:
    """Returns the head of ``model``, with a weight of its own."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    both: tuple[Any, ...] = (model, model.base_model)
    for module in both:
        module.all_tied_weights_keys = {}
    return head


def set_weight(module: Any, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
    """Gives a linear or an embedding another weight, and the sizes that it tells."""
    trained = module.weight.requires_grad
    module.weight = nn.Parameter(weight_OI.detach(), requires_grad=trained)
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight_OI.shape
        return
    module.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=trained)
    module.out_features, module.in_features = weight_OI.shape


class SlicedLlamaConfig(LlamaConfig):
    """LlamaConfig with ``slice_sizes``."""

    model_type = "sliced_llama"
    slice_sizes: list[int] | None = None


class SlicedLlamaDecoderLayer(SlicedLayer, LlamaDecoderLayer):
    """Llama's layer, sliced."""

    layout = LLAMA


class SlicedLlamaForCausalLM(SlicedCausalLM, LlamaForCausalLM):
    """Llama, sliced."""

    config_class = SlicedLlamaConfig
    layer_class = SlicedLlamaDecoderLayer


class SlicedMistralConfig(MistralConfig):
    """MistralConfig with ``slice_sizes``."""

    model_type = "sliced_mistral"
    slice_sizes: list[int] | None = None


class SlicedMistralDecoderLayer(SlicedLayer, MistralDecoderLayer):
    """Mistral's layer, sliced."""

    layout = LLAMA


class SlicedMistralForCausalLM(SlicedCausalLM, MistralForCausalLM):
    """Mistral, sliced."""

    config_class = SlicedMistralConfig
    layer_class = SlicedMistralDecoderLayer


class SlicedQwen2Config(Qwen2Config):
    """Qwen2Config with ``slice_sizes``."""

    model_type = "sliced_qwen2"
    slice_sizes: list[int] | None = None


class SlicedQwen2DecoderLayer(SlicedLayer, Qwen2DecoderLayer):
    """Qwen2's layer, sliced."""

    layout = LLAMA


class SlicedQwen2ForCausalLM(SlicedCausalLM, Qwen2ForCausalLM):
    """Qwen2, sliced."""

    config_class = SlicedQwen2Config
    layer_class = SlicedQwen2DecoderLayer


class SlicedQwen3Config(Qwen3Config):
    """Qwen3Config with ``slice_sizes``."""

    model_type = "sliced_qwen3"
    slice_sizes: list[int] | None = None


class SlicedQwen3DecoderLayer(SlicedLayer, Qwen3DecoderLayer):
    """Qwen3's layer, sliced."""

    layout = LLAMA


class SlicedQwen3ForCausalLM(SlicedCausalLM, Qwen3ForCausalLM):
    """Qwen3, sliced."""

    config_class = SlicedQwen3Config
    layer_class = SlicedQwen3DecoderLayer


class SlicedPhi3Config(Phi3Config):
    """Phi3Config with ``slice_sizes``."""

    model_type = "sliced_phi3"
    slice_sizes: list[int] | None = None


class SlicedPhi3DecoderLayer(SlicedLayer, Phi3DecoderLayer):
    """Phi-3's layer, sliced."""

    layout = PHI3


class SlicedPhi3ForCausalLM(SlicedCausalLM, Phi3ForCausalLM):
    """Phi-3, sliced."""

    config_class = SlicedPhi3Config
    layer_class = SlicedPhi3DecoderLayer


class SlicedOPTConfig(OPTConfig):
    """OPTConfig with ``slice_sizes``."""

    model_type = "sliced_opt"
    slice_sizes: list[int] | None = None


class SlicedOPTDecoderLayer(SlicedLayer, OPTDecoderLayer):
    """OPT's layer, sliced."""

    layout = OPT


class SlicedOPTForCausalLM(SlicedCausalLM, OPTForCausalLM):
    """OPT, sliced."""

    config_class = SlicedOPTConfig
    layer_class = SlicedOPTDecoderLayer


class SlicedPhiConfig(PhiConfig):
    """PhiConfig with ``slice_sizes``."""

    model_type = "sliced_phi"
    slice_sizes: list[int] | None = None


class SlicedPhiDecoderLayer(SlicedLayer, PhiDecoderLayer):
    """Phi-2's layer, sliced."""

    layout = PHI


class SlicedPhiForCausalLM(SlicedCausalLM, PhiForCausalLM):
    """Phi-2, sliced."""

    config_class = SlicedPhiConfig
    layer_class = SlicedPhiDecoderLayer


SLICED: dict[str, type[SlicedCausalLM]] = {
    "llama": SlicedLlamaForCausalLM,
    "mistral": SlicedMistralForCausalLM,
    "opt": SlicedOPTForCausalLM,
    "phi": SlicedPhiForCausalLM,
    "phi3": SlicedPhi3ForCausalLM,
    "qwen2": SlicedQwen2ForCausalLM,
    "qwen3": SlicedQwen3ForCausalLM,
}


def sliced_class(model: PreTrainedModel) -> type[SlicedCausalLM]:
    """Returns the sliced class of the family that ``model``, sliced or not, is of."""
    return SLICED[model.config.model_type.removeprefix("sliced_")]


def register() -> None:
    """Registers the sliced families with transformers' Auto classes; a second call changes nothing."""
    for kind in SLICED.values():
        config: Any = kind.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, kind, exist_ok=True)


def _copy_this_file_on_save() -> None:
    for kind in SLICED.values():
        config: Any = kind.config_class
        config.register_for_auto_class()
        kind.register_for_auto_class("AutoModelForCausalLM")


_copy_this_file_on_save()


if (
    __name__ == "lit_prune.models.remote_code.modeling_sliced"
):  # the copy in an exported folder is found by that folder's auto_map
    register()
