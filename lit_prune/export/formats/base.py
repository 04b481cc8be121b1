"""The interface of an export format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.export.plan import ExportPlan, Outline
from lit_prune.target import StoredBytes


@dataclass(frozen=True)
class Tolerance:
    """The differences that a lossy format may make; the default allows none beyond the rounding of the data type.

    Attributes:
        weights: Largest difference of a weight, as a share of its tensor's largest absolute value. Rounding
            to 8 bits with one scale per group of weights, for example, makes about 0.004.
        logits: Largest difference of a logit, as a share of the largest absolute logit.
        perplexity: Difference of the perplexity, as a share of it.
    """

    weights: float = 0.0
    logits: float = 0.0
    perplexity: float = 0.0


class ExportFormat(ABC):
    """A layout of the exported folder `model/`: writes a model, opens it again and counts its bytes.

    A run calls :meth:`check` first. At its end it writes to a folder beside the final one, opens that and compares it
    with the model in memory; only then does the folder get its final name.

    Attributes:
        stores_zeros: Whether pruned weights are stored like others.
        opened_as_stored: Whether what runs the model keeps the weights in memory as they are stored.
    """

    stores_zeros = True  # not annotated, see ``Allocation``
    opened_as_stored = False

    @property
    def tolerance(self) -> Tolerance:
        """The differences from the model in memory that are accepted when the folder is verified."""
        return Tolerance()

    @property
    def library_name(self) -> str | None:
        """The library that the model card names, for the hub; None for a folder that no library there opens."""
        return "transformers"

    @property
    def tags(self) -> Sequence[str]:
        """The tags of the model card, beside those of every format."""
        return ()

    def check(self, outline: Outline) -> None:  # noqa: B027 (some formats hold everything)
        """Raises InputError for a model that the format cannot hold.

        It is called at the start of a run, with the outline that is expected, and again before the model is merged or
        written.
        """

    def check_model(self, model: PreTrainedModel, tokenizer: Tokenizer | None) -> None:  # noqa: B027 (as above)
        """Raises InputError for a model or a tokenizer that the format cannot hold.

        It is called at the start of a run, beside :meth:`check`, for what an outline does not tell.

        Args:
            model: The model before the cut; it may be on the meta device.
            tokenizer: The tokenizer that will be passed to :meth:`write`.
        """

    @abstractmethod
    def write(self, plan: ExportPlan, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes the model and its tokenizer to ``folder``, which is created if it does not exist."""

    @abstractmethod
    def open(
        self,
        folder: Path,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        on_disk: bool = False,
        trust_remote_code: bool = False,
    ) -> PreTrainedModel:
        """Returns the model that :meth:`write` left in ``folder``, with its adapter if that was not merged.

        Its weights equal those that were written, within :attr:`tolerance`.

        Args:
            folder: The folder.
            device: Device of the weights.
            dtype: Data type of the weights in memory; None is the one that they are stored in.
            on_disk: Leave the weights in their files, for a model that is larger than memory.
            trust_remote_code: Run the custom code that was written with the model, if it has any.
        """

    @abstractmethod
    def bytes(self, plan: ExportPlan) -> int:
        """Returns the bytes that the weights take in a folder of this format."""

    def stored_bytes(self, model: PreTrainedModel, dtype: torch.dtype) -> StoredBytes:
        """Returns the bytes that the weights of ``model`` would take in a folder of this format, zeros included.

        Args:
            model: A model in full precision, without an adapter.
            dtype: Data type in which it would be written.
        """
        return StoredBytes.of(model, dtype)

    def dtype(self, plan: ExportPlan) -> str:
        """Returns the name of the data type that the weights are stored in, such as `bfloat16`."""
        return str(plan.plain.dtype).removeprefix("torch.")

    def usage(self, outline: Outline, tokenizer: str, imports: Sequence[str] = ()) -> str:
        """Returns the part of the model card, in Markdown, that says how the folder is opened.

        Args:
            outline: The outline of the exported model.
            tokenizer: Folder or hub id of the tokenizer.
            imports: Lines of Python that the model's structures need first.
        """
        name, module = type(self).__name__, type(self).__module__
        lines = ["from pathlib import Path", "", "import torch", *imports, f"from {module} import {name}", ""]
        lines.append(f'model = {self}.open(Path("this/folder"), torch.device("cpu"))')
        return "\n".join(["```python", *lines, "```"])
