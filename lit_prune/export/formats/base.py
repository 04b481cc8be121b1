"""The interface of an export format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.export.plan import ExportPlan, Outline


class ExportFormat(ABC):
    """A layout of the exported folder `model/`: how a model is written, opened again and counted.

    A run checks its outline first, writes into a folder beside the final one, opens that, compares it with the model in
    memory, and only then gives it its name.
    """

    def check(self, outline: Outline) -> None:  # noqa: B027 (some formats hold everything)
        """Raises InputError for a model that the format cannot hold, before it is trained, merged or written."""

    @abstractmethod
    def write(self, plan: ExportPlan, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes the model, and its tokenizer, into ``folder``, which is made where it is missing."""

    @abstractmethod
    def open(self, folder: Path, device: torch.device, *, on_disk: bool = False) -> PreTrainedModel:
        """Returns the model that :meth:`write` left in ``folder``, with its adapter where that was not merged.

        Its weights are bit for bit those that were written.

        Args:
            folder: The folder.
            device: Where the weights go.
            on_disk: Leave the weights in their files, for a model that is bigger than memory.
        """

    @abstractmethod
    def bytes(self, plan: ExportPlan) -> int:
        """Returns the bytes that the weights take in a folder of this format."""
