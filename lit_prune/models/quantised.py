"""Linears that bitsandbytes quantises to 4 or 8 bits, with the masks of their pruned weights.

Every quantised type represents zero exactly, so pruned weights stay zero; but small weights are rounded to zero as
well. The zeros of a quantised weight therefore do not tell which weights were pruned, and the mask is stored beside it
as bits.
Suffixes: O output channels, I input channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, final

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.pytorch_utils import Conv1D

from lit_prune.models.tensors import pack_bits, unpack_bits

Quantization = Literal["nf4", "fp4", "int8"]
MASK = "mask_bits"
MULTIPLES = (32, 64)  # (out, in) of a 4-bit linear must be divisible by these on a CPU that has AVX512-BF16
THRESHOLD = 6.0  # of LLM.int8(): columns of activations above it stay in half precision; transformers' default


@final
class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit linear, made to load a state dict and to leave its weights unchanged.

    On a CPU with AVX512-BF16 the parent class repacks its weights at the first forward pass without gradients, with
    scales rounded to bfloat16, and never fully restores them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.support_avx512bf16_for_cpu = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        begin = f"{prefix}weight."
        names = [name for name in state_dict if name.startswith(begin)]
        if names:
            state = {name.removeprefix(begin): state_dict.pop(name).clone() for name in names}
            self.quant_state = QuantState.from_dict(state, self.weight.device)
            self.weight.quant_state = self.quant_state  # type: ignore[attr-defined]
        super()._load_from_state_dict(state_dict, prefix, *rest)


@final
class Linear8bit(bnb.nn.Linear8bitLt):
    """bitsandbytes' 8-bit linear, made to move its scales to another device together with its weights."""

    def _apply(self, fn: Any, recurse: bool = True) -> Linear8bit:
        super()._apply(fn, recurse)
        holders: tuple[Any, ...] = (self.weight, self.state)
        for holder in holders:
            if holder.SCB is not None:
                holder.CB, holder.SCB = self.weight.data, holder.SCB.to(self.weight.device)
        return self


def quantised(linear: nn.Linear | Conv1D, quantization: Quantization, double_quant: bool, *, masked: bool) -> nn.Linear:
    """Returns a quantised copy of a linear, in 4 or 8 bits, on the same device.

    Args:
        linear: The linear in full precision, which is not changed.
        quantization: Type of the weights.
        double_quant: Quantise the scales of 4-bit weights too.
        masked: Store the mask of the weights that are not zero, see :func:`mask`.

    Raises:
        RuntimeError: if a zero of a masked weight is not zero after quantisation.
    """
    weight_OI = linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()
    module = _packed(weight_OI, linear.bias is not None, quantization, double_quant)
    module.bias = linear.bias
    module.source_cls = type(linear)  # the name of this attribute in transformers
    module.weight_dtype = weight_OI.dtype
    if masked:
        module.register_buffer(MASK, pack_bits(weight_OI != 0).to(weight_OI.device))
        check_zeros(dequantised(module), module, "quantised")
    return module.train(linear.training)


def _packed(weight_OI: Tensor, bias: bool, quantization: Quantization, double_quant: bool) -> Any:
    """Returns a module with the weight ``weight_OI`` quantised, on the same device, and without a bias."""
    (outs, ins), contiguous = weight_OI.shape, weight_OI.contiguous()
    module: Any
    with torch.device("meta"):
        if quantization == "int8":
            module = Linear8bit(ins, outs, bias, has_fp16_weights=False, threshold=THRESHOLD)
        else:
            module = Linear4bit(ins, outs, bias, weight_OI.dtype, double_quant, quantization)
    if quantization == "int8":
        # Int8Params itself quantises only a weight that comes from the CPU, not one that is on a GPU already
        packed_OI, scales_O, _ = int8_vectorwise_quant(contiguous.half())
        module.weight = bnb.nn.Int8Params(packed_OI, requires_grad=False, CB=packed_OI, SCB=scales_O)
    else:
        kind: dict[str, Any] = {"quant_type": quantization, "compress_statistics": double_quant}
        weight: Any = bnb.nn.Params4bit(contiguous, requires_grad=False, module=module, **kind)
        module.weight = weight.to(weight_OI.device)  # the first move to a device quantises it
    return module


def is_quantised(module: nn.Module) -> bool:
    """Returns whether ``module`` is a bitsandbytes linear, made here or by transformers."""
    return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def quantised_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the quantised linears of ``model`` with their names."""
    return ((name, module) for name, module in model.named_modules() if is_quantised(module))


def quantisation(model: nn.Module) -> dict[str, Any] | None:
    """Returns the arguments of :func:`quantised` that ``model`` was quantised with; None for full precision."""
    for _, module in quantised_linears(model):
        if isinstance(module, bnb.nn.Linear8bitLt):
            return {"quantization": "int8", "double_quant": False}
        return {"quantization": module.weight.quant_type, "double_quant": module.weight.compress_statistics}
    return None


@torch.no_grad()
def dequantised(module: Any) -> Tensor:
    """Returns the matrix of a quantised linear, (out, in), in the data type that it was quantised from."""
    weight: Any = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state or module.quant_state)
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return int8_vectorwise_dequant(weight.data, scales).to(getattr(module, "weight_dtype", torch.float32))


def mask(module: nn.Module) -> Tensor | None:
    """Returns the mask of a quantised linear, (out, in), False for pruned weights; None without a mask."""
    bits = getattr(module, MASK, None)
    return None if bits is None else unpack_bits(bits, torch.Size((module.out_features, module.in_features)))  # type: ignore[arg-type]


def pruned(module: Any) -> int:
    """Returns the number of pruned weights of a quantised linear by its mask, or without one the number of zeros."""
    keep_OI = mask(module)
    remaining = torch.count_nonzero(dequantised(module) if keep_OI is None else keep_OI)
    return module.out_features * module.in_features - int(remaining)


def check_zeros(weight_OI: Tensor, module: Any, name: str) -> None:
    """Raises RuntimeError unless ``weight_OI`` is zero wherever the mask of a quantised linear is False."""
    keep_OI = mask(module)
    if keep_OI is not None and bool((weight_OI[~keep_OI] != 0).any()):
        raise RuntimeError(f"weights that were pruned are not zero in the {name} weight.")


def sharing_weight(module: Any) -> nn.Linear:
    """Returns another quantised linear with the weight of ``module``, whose state dict does not have the mask."""
    weight, ins, outs, bias = module.weight, module.in_features, module.out_features, module.bias is not None
    other: Any
    with torch.device("meta"):
        if isinstance(module, bnb.nn.Linear8bitLt):
            other = Linear8bit(ins, outs, bias, has_fp16_weights=False, threshold=module.state.threshold)
        else:
            kind = weight.quant_type
            other = Linear4bit(ins, outs, bias, module.compute_dtype, weight.compress_statistics, kind)
            other.quant_state = weight.quant_state
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        weight = bnb.nn.Int8Params(weight.data, requires_grad=False, CB=weight.data, SCB=scales)
    other.weight, other.bias = weight, module.bias
    other.source_cls, other.weight_dtype = module.source_cls, getattr(module, "weight_dtype", None)
    if getattr(module, MASK, None) is not None:
        other.register_buffer(MASK, getattr(module, MASK), persistent=False)
    return other.train(module.training)


def make_loadable(model: nn.Module) -> None:
    """Replaces bitsandbytes' own linears in ``model`` by the subclasses above, which can load a state dict."""
    for name, module in list(quantised_linears(model)):
        if not isinstance(module, (Linear4bit, Linear8bit)):
            model.set_submodule(name, sharing_weight(module))


def dense(module: Any, weight_OI: Tensor) -> nn.Module:
    """Returns a linear in full precision with the matrix ``weight_OI`` and the bias of a quantised linear."""
    outs, ins = weight_OI.shape
    with torch.device("meta"):
        if module.source_cls is Conv1D:
            linear: Any = Conv1D(outs, ins)
        else:
            linear = nn.Linear(ins, outs, module.bias is not None)
    linear.weight = nn.Parameter(weight_OI.T.contiguous() if module.source_cls is Conv1D else weight_OI)
    linear.bias = module.bias
    return linear.train(module.training)


def packed_bytes(module: Any) -> int:
    """Returns the bytes of a quantised linear's stored matrix: packed weights, scales and tables."""
    stored = module.state_dict()
    return sum(tensor.nbytes for name, tensor in stored.items() if name not in ("bias", MASK))


def bitsandbytes_config(model: nn.Module) -> BitsAndBytesConfig:
    """Returns the quantisation config that lets transformers load ``model``; linears in full precision are skipped."""
    kind = quantisation(model)
    assert kind is not None
    linears = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    skipped = sorted(linears - {name for name, _ in quantised_linears(model)})
    if kind["quantization"] == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=THRESHOLD, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind["quantization"],
        bnb_4bit_use_double_quant=kind["double_quant"],
        bnb_4bit_compute_dtype=next(module for _, module in quantised_linears(model)).compute_dtype,
        llm_int8_skip_modules=skipped,
    )


def device_map(config: PreTrainedConfig, device: torch.device | str) -> dict[str, Any]:
    """Returns the arguments of ``from_pretrained`` that load a quantised model onto ``device``; none for other models.

    Without them transformers loads it onto the GPU, if there is one. Moving it elsewhere afterwards would leave the
    scales of bitsandbytes' own 8-bit linears behind.
    """
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    return {"device_map": {"": device}} if method == "bitsandbytes" else {}


def unquantised(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns a copy of ``config`` without a quantisation config."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


@torch.no_grad()
def convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Converts the parameters and buffers of ``model`` to ``dtype`` in place; the parameters are replaced by new ones.

    The weights of quantised linears stay as they are, and so does what transformers keeps in float32 when it loads the
    family in half precision. ``from_pretrained`` does not convert the other weights of a quantised folder.
    """
    new: dict[int, nn.Parameter] = {}  # by the identity of the old one, so that tied weights stay tied
    for module, name, tensor in list(convertible(model, dtype)):
        if isinstance(tensor, nn.Parameter):
            new.setdefault(id(tensor), nn.Parameter(tensor.to(dtype), tensor.requires_grad))
            module._parameters[name] = new[id(tensor)]
        else:
            module._buffers[name] = tensor.to(dtype)
    model.config.dtype = dtype


def convertible(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yields the tensors that :func:`convert` converts, each with its module and its name there."""
    float32 = build_glob_alternation(list(plan))[0] if (plan := model._get_dtype_plan(dtype)) else None
    for path, module in model.named_modules():
        skipped = module._non_persistent_buffers_set | ({"weight"} if is_quantised(module) else set())
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or name in skipped or not tensor.is_floating_point() or tensor.dtype == dtype:
                continue
            if float32 is None or not float32.search(f"{path}.{name}"):
                yield module, name, tensor


def compute_exactly(model: nn.Module) -> None:
    """Stops bitsandbytes' own 4-bit linears in ``model`` from repacking their weights, see :class:`Linear4bit`."""
    for _, module in quantised_linears(model):
        module.support_avx512bf16_for_cpu = False
