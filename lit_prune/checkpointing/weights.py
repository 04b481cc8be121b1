"""What of a model's weights a checkpoint must hold: what cannot be had from its source again.

A frozen weight that is bit for bit the source's is not stored; one that is the source's but for zeros is stored as the
bits of its mask; everything else is stored as it is. What is left out is known by its SHA-256, so that weights that
were put together again are the same to the bit, or the checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.models.bits import pack_bits, unpack_bits
from lit_prune.models.digest import digest

LeftOut = dict[str, dict[str, Any]]


class Source:
    """What a model's weights were when they were loaded, by digest, and which are still those but for zeros.

    Args:
        digests: SHA-256 of every weight that can be had from the source, through its mask where it has one; by its
            name in the state dict, the `base_layer` of adapters left out.
        masked: Those that are had through a mask.
    """

    def __init__(self, digests: dict[str, str], masked: set[str] | None = None) -> None:
        self.digests, self.masked = digests, masked or set()
        self._known: dict[str, tuple[tuple[int, int], str]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Source:
        """Returns the source of a model that was just loaded; reads all weights once."""
        return cls({_plain(name): digest(tensor) for name, tensor in model.state_dict().items()})

    @classmethod
    def resumed(cls, left_out: LeftOut) -> Source:
        """Returns what is known of the source of a model that a checkpoint was put into."""
        digests = {_plain(name): known["digest"] for name, known in left_out.items()}
        return cls(digests, {_plain(name) for name, known in left_out.items() if "mask" in known})

    @contextmanager
    def through_cut(self, model: nn.Module, *, keeps_values: bool) -> Iterator[None]:
        """Notes what a cut does to ``model`` while the context lasts.

        Args:
            model: The model, without an adapter.
            keeps_values: Whether the cut sets weights to zero and changes no other.
        """
        intact = {_plain(name) for name, tensor in model.state_dict().items() if self._is_had(name, tensor)}
        yield
        after = {_plain(name): tensor for name, tensor in model.state_dict().items()}
        digests = {name: digest(after[name]) for name in intact & after.keys()}
        changed = {name for name, found in digests.items() if found != self.digests[name]}
        lost = changed if not keeps_values else {name for name in changed if _has_negative_zero(after[name])}
        self.masked = (self.masked & digests.keys() | changed) - lost
        self.digests = {name: found for name, found in digests.items() if name not in lost}
        self._known = {}

    def strip(self, model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> LeftOut:
        """Takes out of ``state_dict`` what can be had again; returns how each of it is had.

        Args:
            model: The model whose weights they are.
            state_dict: Of the module that holds it; changed in place.
            prefix: Before the names of the model's weights.
        """
        trained = {
            name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad
        }
        left_out: LeftOut = {}
        for name, tensor in model.state_dict().items():
            if prefix + name in state_dict and name not in trained and self._is_had(name, tensor):
                del state_dict[prefix + name]
                left_out[name] = {"digest": self.digests[_plain(name)]}
                if _plain(name) in self.masked:
                    left_out[name]["mask"] = pack_bits(tensor != 0)
        return left_out

    def _is_had(self, name: str, tensor: Tensor) -> bool:
        """Whether a weight is what the source and its mask give; one that was not written to is read only once."""
        expected = self.digests.get(_plain(name))
        if expected is None:
            return False
        state = (tensor.data_ptr(), tensor._version)
        if name not in self._known or self._known[name][0] != state:
            self._known[name] = (state, digest(tensor))
        return self._known[name][1] == expected


def fill(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, left_out: LeftOut) -> None:
    """Puts back into ``state_dict`` what was left out, from ``model`` as it came from its source.

    Args:
        model: The model, of the checkpoint's structure, its other weights those of the source.
        state_dict: Of the module that holds it; changed in place.
        prefix: Before the names of the model's weights.
        left_out: What :meth:`Source.strip` returned.

    Raises:
        InputError: if the model is not the one that the checkpoint was made from.
    """
    own = model.state_dict()
    for name, known in left_out.items():
        if name in own and prefix + name not in state_dict:
            state_dict[prefix + name] = _had(own[name], known, name)
    stored = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    for name in sorted(own.keys() | stored.keys()):
        told = ".quant_state." in name  # numbers as text, which differs in length
        if name not in own or name not in stored or (own[name].shape != stored[name].shape and not told):
            raise _another_model(name)


def _had(tensor: Tensor, known: dict[str, Any], name: str) -> Tensor:
    if "mask" in known:
        if known["mask"].numel() != -(-tensor.numel() // 8):
            raise _another_model(name)
        tensor = torch.where(unpack_bits(known["mask"], tensor.shape).to(tensor.device), tensor, 0)
    if digest(tensor) != known["digest"]:
        raise _another_model(name)
    return tensor


def _another_model(name: str) -> InputError:
    return InputError(
        f"`model.pretrained` must be the model that the checkpoint was made from, its weights do not fit: {name} is "
        "another. Checkpoints leave out what the source has, unless `pruning.full_checkpoint` is true."
    )


def _plain(name: str) -> str:
    """A weight's name as it is without an adapter."""
    return name.replace(".base_layer.", ".")


def _has_negative_zero(tensor: Tensor) -> bool:
    """Whether it holds -0.0, which a mask of what is not zero would not give back."""
    return bool((torch.signbit(tensor) & (tensor == 0)).any())
