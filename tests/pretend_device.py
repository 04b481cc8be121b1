"""A pretended GPU: tensors that say they are on the device `pretend`, whose values are on the CPU.

Within :func:`pretended` a tensor moves there by ``.to("pretend")``, and an operation that mixes it with a tensor on the
CPU raises RuntimeError, as on a GPU. Unlike torch's FakeTensorMode it computes real values, so that code runs whose
course depends on them, and its results can be compared with the CPU's.

The device is registered with torch for the rest of the process: tests use it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)


class _Module(_DummyBackendModule):
    """What torch asks of the module of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False  # else it would be the default of whatever looks for an accelerator


_setup_privateuseone_for_python_backend("pretend", _Module(), _Hook())
DEVICE, CPU = torch.device("pretend", 0), torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class PretendedTensor(torch.Tensor):
    """A tensor that says it is on the pretended GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls: Any, held: Tensor) -> PretendedTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"PretendedTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class Dispatching(TorchDispatchMode):
    """Creates tensors on the pretended GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Does what torch cannot do with subclasses: ``tolist``, ``torch.tensor``, ``parameter.data = ...``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return func(args[0].cpu())
        if func is torch.tensor and (kwargs or {}).get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if func == torch.Tensor.data.__set__ and args[0].device != args[1].device:  # type: ignore[attr-defined]
            return replace(*args)
        return func(*args, **(kwargs or {}))


def replace(tensor: Tensor, value: Tensor) -> None:
    """Makes ``tensor``, a parameter or a buffer, the ``value`` of another device; its hooks and attributes stay."""
    new: Any = value.detach()
    new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    kept = {name: held for name, held in vars(tensor).items() if name not in ("held", "_is_param")}
    hooks = tensor._backward_hooks
    if tensor.grad is not None:
        new.grad = tensor.grad.to(value.device)
    tensor.__class__, new.__class__ = new.__class__, tensor.__class__
    tensor.__dict__, new.__dict__ = {**vars(new), **kept}, {}
    torch._C._swap_tensor_impl(tensor, new)
    tensor._backward_hooks = hooks


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs one operation on the values, and returns its result on the device that it belongs to."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    check(func, args, tensors)
    pretends = any(isinstance(tensor, PretendedTensor) for tensor in tensors)
    if kwargs.get("device") is not None:
        pretends = torch.device(kwargs["device"]).type == "pretend"
        kwargs = {**kwargs, "device": CPU} if pretends else kwargs  # `meta` stays: models are loaded on it
    if func is aten._to_copy.default:  # a copy, even to the device and the type that the tensor has
        kwargs = {name: value for name, value in kwargs.items() if name != "non_blocking"}
    if func is aten.histc.default and not args[0].is_floating_point():  # which a GPU takes
        return call(func, (args[0].float(), *args[1:]), kwargs).to(args[0].dtype)
    values = tree_map(lambda leaf: leaf.held if isinstance(leaf, PretendedTensor) else leaf, (args, kwargs))
    result = func(*values[0], **values[1])
    if func is aten.copy_.default:
        return args[0]
    if not pretends:
        return result
    wrapped = tree_map(lambda leaf: PretendedTensor(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raises RuntimeError for tensors on different devices, where a GPU would not take them."""
    devices = {tensor.device.type for tensor in tensors if tensor.ndim or isinstance(tensor, PretendedTensor)}
    if len(devices) < 2 or func in COPIES:
        return
    if func in INDEXING and isinstance(args[0], PretendedTensor):  # by indices on the CPU
        others = [tensor for tensor in args[2:3] if isinstance(tensor, Tensor) and tensor.ndim]
        if all(isinstance(tensor, PretendedTensor) for tensor in others):
            return
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor)]
    if all(tensor.ndim == 0 for tensor in on_cpu) and isinstance(args[0], PretendedTensor):
        return
    raise RuntimeError(f"Expected all tensors to be on the same device: {func} was given some on the CPU")


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Yields the pretended GPU."""
    with ExitStack() as stack:
        patches = stack.enter_context(pytest.MonkeyPatch.context())
        patches.setattr(torch, "_has_compatible_shallow_copy_type", lambda _one, _other: True)  # as for a GPU
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # there is no thread for the device
        stack.enter_context(Dispatching())
        stack.enter_context(Functions())
        yield DEVICE
