"""The weights that a checkpoint leaves out because the model's source has them.

A frozen weight that is bit for bit the source's is not stored; one that is the source's but for zeros is stored as the
bits of its mask; every other weight is stored whole. The SHA-256 of each weight that is left out is stored too, so that
a restored weight is the same to the bit, or the checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.models.bits import pack_bits, unpack_bits
from lit_prune.models.digest import digest


@final
@dataclass(frozen=True)
class DroppedWeight:
    """What a checkpoint holds in the place of a weight.

    Args:
        digest: SHA-256 of the weight.
        mask: Which of its values are not zero, a bit each; None where it is the source's weight unchanged.
    """

    digest: str
    mask: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns it in types that a checkpoint can hold."""
        return {"digest": self.digest, "mask": self.mask}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> DroppedWeight:
        """Returns what :meth:`to_dict` wrote."""
        return cls(stored["digest"], stored["mask"])

    def restored(self, tensor: Tensor, name: str) -> Tensor:
        """Returns the weight, made from ``tensor``, the source's weight of that ``name``.

        Raises:
            InputError: if that is another weight.
        """
        if self.mask is not None:
            if self.mask.numel() != -(-tensor.numel() // 8):
                raise _another_model(name)
            tensor = torch.where(unpack_bits(self.mask, tensor.shape).to(tensor.device), tensor, 0)
        if digest(tensor) != self.digest:
            raise _another_model(name)
        return tensor


class SourceWeights:
    """Which weights of a model its source has: what they were when they were loaded, by digest.

    Args:
        digests: SHA-256 of every weight that can be restored from the source, through its mask where it has one; by
            its name in the state dict without the `base_layer` of adapters.
        masked: Names of those that are restored through a mask.
    """

    def __init__(self, digests: dict[str, str], masked: set[str] | None = None) -> None:
        self.digests, self.masked = digests, masked or set()
        self._known: dict[str, tuple[tuple[int, int], str]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> SourceWeights:
        """Returns those of a model that was just loaded; reads all weights once."""
        return cls({_plain(name): digest(tensor) for name, tensor in model.state_dict().items()})

    @classmethod
    def resumed(cls, dropped: Mapping[str, DroppedWeight]) -> SourceWeights:
        """Returns those of a model that is restored from a checkpoint."""
        digests = {_plain(name): weight.digest for name, weight in dropped.items()}
        return cls(digests, {_plain(name) for name, weight in dropped.items() if weight.mask is not None})

    @contextmanager
    def through_cut(self, model: nn.Module, *, keeps_values: bool) -> Iterator[None]:
        """Follows what a cut does to ``model`` while the context lasts.

        Args:
            model: The model, without an adapter.
            keeps_values: Whether the cut sets weights to zero and changes no other.
        """
        intact = {_plain(name) for name, tensor in model.state_dict().items() if self._is_recoverable(name, tensor)}
        yield
        after = {_plain(name): tensor for name, tensor in model.state_dict().items()}
        digests = {name: digest(after[name]) for name in intact & after.keys()}
        changed = {name for name, value in digests.items() if value != self.digests[name]}
        lost = changed if not keeps_values else {name for name in changed if _has_negative_zero(after[name])}
        self.masked = (self.masked & digests.keys() | changed) - lost
        self.digests = {name: value for name, value in digests.items() if name not in lost}
        self._known = {}

    def drop_from(self, state_dict: dict[str, Tensor], model: nn.Module, prefix: str) -> dict[str, DroppedWeight]:
        """Takes the weights that can be restored out of ``state_dict``; returns what is stored in their place.

        Args:
            state_dict: Of the module that holds the model; changed in place.
            model: The model whose weights they are.
            prefix: What stands before the names of the model's weights.
        """
        trained = {
            name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad
        }
        dropped: dict[str, DroppedWeight] = {}
        for name, tensor in model.state_dict().items():
            if prefix + name in state_dict and name not in trained and self._is_recoverable(name, tensor):
                del state_dict[prefix + name]
                mask = pack_bits(tensor != 0) if _plain(name) in self.masked else None
                dropped[name] = DroppedWeight(self.digests[_plain(name)], mask)
        return dropped

    def _is_recoverable(self, name: str, tensor: Tensor) -> bool:
        """Whether a weight is what the source and its mask give; one that was not written to is read only once."""
        expected = self.digests.get(_plain(name))
        if expected is None:
            return False
        state = (tensor.data_ptr(), tensor._version)  # torch counts every write in place in `_version`
        if name not in self._known or self._known[name][0] != state:
            self._known[name] = (state, digest(tensor))
        return self._known[name][1] == expected


def restore_weights(
    state_dict: dict[str, Tensor], model: nn.Module, prefix: str, dropped: Mapping[str, DroppedWeight]
) -> None:
    """Puts the weights that a checkpoint leaves out back into ``state_dict``.

    Args:
        state_dict: Of the module that holds the model; changed in place.
        model: The model, of the checkpoint's structure, its other weights those of the source.
        prefix: What stands before the names of the model's weights.
        dropped: What :meth:`SourceWeights.drop_from` returned.

    Raises:
        InputError: if the model is not the one that the checkpoint was made from.
    """
    source = model.state_dict()
    for name, weight in dropped.items():
        if name in source and prefix + name not in state_dict:
            state_dict[prefix + name] = weight.restored(source[name], name)
    stored = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    for name in sorted(source.keys() | stored.keys()):
        is_text = ".quant_state." in name  # bitsandbytes' numbers as text, whose length differs
        if name not in source or name not in stored or (source[name].shape != stored[name].shape and not is_text):
            raise _another_model(name)


def _another_model(name: str) -> InputError:
    return InputError(
        f"`model.pretrained` must be the model that the checkpoint was made from, its weights do not fit: {name} is "
        "another. Checkpoints leave out what the source has, unless `pruning.full_checkpoint` is true."
    )


def _plain(name: str) -> str:
    """The name of a weight without an adapter around it."""
    return name.replace(".base_layer.", ".")


def _has_negative_zero(tensor: Tensor) -> bool:
    """Whether it holds -0.0, which a mask of what is not zero would not give back."""
    return bool((torch.signbit(tensor) & (tensor == 0)).any())
