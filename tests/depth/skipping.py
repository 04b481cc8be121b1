"""A dense model that skips blocks: what removing them must give."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from tests.conftest import blocks_of


@contextmanager
def skipping(model: PreTrainedModel, blocks: Collection[int]) -> Iterator[PreTrainedModel]:
    """Replaces the output of ``blocks`` by their input."""

    def as_input(_module: Any, args: tuple[Any, ...], output: Any) -> Any:
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    hooks = [layer.register_forward_hook(as_input) for number, layer in enumerate(blocks_of(model)) if number in blocks]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
