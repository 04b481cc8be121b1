"""The weights that a checkpoint leaves out because they can be restored from the model's source.

A frozen weight that equals the source's bit for bit is not stored. One that differs from the source's only by zeros is
stored as the bits of its mask. Every other weight is stored whole. The SHA-256 of each weight that is left out is
stored too, so that a restored weight is either bit-identical or an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.models.tensors import digest, pack_bits, unpack_bits


@final
@dataclass(frozen=True)
class DroppedWeight:
    """The replacement of a weight in a checkpoint.

    Args:
        digest: SHA-256 of the weight.
        mask: One bit per value, set if that is not zero; None if the weight equals the source's.
    """

    digest: str
    mask: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in types that a checkpoint can hold."""
        return {"digest": self.digest, "mask": self.mask}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> DroppedWeight:
        """Returns the replacement from what :meth:`to_dict` returned."""
        return cls(stored["digest"], stored["mask"])

    def restored(self, tensor: Tensor, name: str) -> Tensor:
        """Returns the weight, restored from ``tensor``, the source's weight of that ``name``.

        Raises:
            InputError: if the result is not the weight that was left out.
        """
        if self.mask is not None:
            if self.mask.numel() != -(-tensor.numel() // 8):
                raise _another_model(name)
            tensor = torch.where(unpack_bits(self.mask, tensor.shape).to(tensor.device), tensor, 0)
        if digest(tensor) != self.digest:
            raise _another_model(name)
        return tensor


class SourceWeights:
    """The weights of a model that can be restored from its source, recognised by their digests.

    Args:
        digests: SHA-256 of every such weight, after masking if it is masked, by its name in the state dict without the
            `base_layer` of adapters.
        masked: Names of the weights that need a mask to be restored.
    """

    def __init__(self, digests: dict[str, str], masked: set[str] | None = None) -> None:
        self.digests, self.masked = digests, masked or set()
        self._known: dict[str, tuple[tuple[int, int], str]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> SourceWeights:
        """Returns the source weights of a model that was just loaded; reads all weights once."""
        return cls({_plain(name): digest(tensor) for name, tensor in model.state_dict().items()})

    @classmethod
    def resumed(cls, dropped: Mapping[str, DroppedWeight]) -> SourceWeights:
        """Returns the source weights of a model that is restored from a checkpoint."""
        digests = {_plain(name): weight.digest for name, weight in dropped.items()}
        return cls(digests, {_plain(name) for name, weight in dropped.items() if weight.mask is not None})

    @contextmanager
    def through_cut(self, model: nn.Module, *, keeps_values: bool) -> Iterator[None]:
        """Updates the digests and masks for a cut of ``model`` that the body makes.

        Args:
            model: The model, without an adapter.
            keeps_values: Whether the cut only sets weights to zero and changes no others.
        """
        recoverable = {
            _plain(name) for name, tensor in model.state_dict().items() if self._is_recoverable(name, tensor)
        }
        yield
        after = {_plain(name): tensor for name, tensor in model.state_dict().items()}
        digests = {name: digest(after[name]) for name in recoverable & after.keys()}
        changed = {name for name, value in digests.items() if value != self.digests[name]}
        lost = changed if not keeps_values else {name for name in changed if _has_negative_zero(after[name])}
        self.masked = (self.masked & digests.keys() | changed) - lost
        self.digests = {name: value for name, value in digests.items() if name not in lost}
        self._known = {}

    def drop_from(self, state_dict: dict[str, Tensor], model: nn.Module, prefix: str) -> dict[str, DroppedWeight]:
        """Removes the weights that can be restored from ``state_dict``; returns their replacements, by name.

        Args:
            state_dict: State dict of the module that holds the model; changed in place.
            model: The model.
            prefix: Prefix of the model's weights in ``state_dict``.
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
        """Returns whether the source and the mask give this weight; hashes it again only after it was written to."""
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
    """Adds the weights that a checkpoint leaves out to ``state_dict``.

    Args:
        state_dict: State dict of the module that holds the model; changed in place.
        model: The model with the weights of its source, in the structure of the checkpoint.
        prefix: Prefix of the model's weights in ``state_dict``.
        dropped: The replacements that :meth:`SourceWeights.drop_from` returned.

    Raises:
        InputError: if the model is not the one that the checkpoint was made from.
    """
    source = model.state_dict()
    for name, weight in dropped.items():
        if name in source and prefix + name not in state_dict:
            state_dict[prefix + name] = weight.restored(source[name], name)
    stored = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    for name in sorted(source.keys() | stored.keys()):
        is_text = ".quant_state." in name  # bitsandbytes stores numbers as text, whose length varies
        if name not in source or name not in stored or (source[name].shape != stored[name].shape and not is_text):
            raise _another_model(name)


def _another_model(name: str) -> InputError:
    return InputError(
        f"`model.pretrained` must be the model that the checkpoint was made from; its weight {name} differs. "
        "Checkpoints leave out the weights that the source has, unless `pruning.full_checkpoint` is true."
    )


def _plain(name: str) -> str:
    """Returns the name that the weight has without an adapter."""
    return name.replace(".base_layer.", ".")


def _has_negative_zero(tensor: Tensor) -> bool:
    """Returns whether ``tensor`` holds -0.0, which a mask restores as 0.0."""
    return bool((torch.signbit(tensor) & (tensor == 0)).any())
