"""A Hugging Face folder whose pruned weights are stored as bits and values, and that opens after `import lit_prune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.core_model_loading import revert_weight_conversion

from lit_prune.errors import InputError
from lit_prune.export.formats import folder as hugging_face
from lit_prune.export.formats.base import ExportFormat
from lit_prune.export.plan import ExportPlan, Outline
from lit_prune.packed.pack import layout_of, pack_folder

IMPORT = "import lit_prune  # opens packed weights"
NOTE = (
    "Its pruned weights are packed: opening it needs lit_prune (`pip install lit-prune`), and gives an ordinary dense "
    "model. Without lit_prune, `python unpack.py this/folder OUTPUT` writes the ordinary folder; it needs torch and "
    "safetensors alone."
)


@final
@dataclass(frozen=True)
class Packed(ExportFormat):
    """A Hugging Face folder with every pruned weight as a bit mask and its values, without loss.

    It is smaller than the ordinary folder: a matrix in bfloat16 takes 56% of its bytes at a sparsity of 0.5, 36% at
    0.7, and 55% if it is 2:4. Opened, the model is dense, with zeros: packing makes it neither smaller in memory nor
    faster. An adapter that is not merged is saved beside the weights, as in the ordinary folder.

    Raises:
        InputError: for a model without masks, with quantised weights, or with weights that stay on disk.
    """

    stores_zeros = False

    def check(self, outline: Outline) -> None:
        """Raises InputError for a model that has nothing to pack, or whose weights are stored in another way."""
        if outline.quantised:
            raise InputError(
                "`format` must be HuggingFace for weights in 4 or 8 bits, which are packed already, got Packed: or "
                "export them in full precision, by QLoRA's `--pruning.recovery.form merged`."
            )
        if not outline.masked:
            raise InputError(
                "`format` must be HuggingFace for a model without pruned weights, got Packed: there are no zeros to "
                "leave out."
            )
        if outline.on_disk:
            raise InputError(
                "`format` must be HuggingFace with `model.on_disk`, got Packed: packed weights are opened in memory."
            )

    def write(self, plan: ExportPlan, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes the ordinary folder, then packs its weights file by file."""
        hugging_face.write_folder(plan, folder, tokenizer)
        pack_folder(folder)

    def open(
        self,
        folder: Path,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        on_disk: bool = False,
        trust_remote_code: bool = False,
    ) -> PreTrainedModel:
        """Returns the dense model that transformers unpacks."""
        return hugging_face.open_folder(folder, device, dtype, trust_remote_code)

    def bytes(self, plan: ExportPlan) -> int:
        """Returns the bytes of the stored tensors, without the headers of safetensors."""
        stored = revert_weight_conversion(plan.plain, plan.plain.state_dict())  # each expert has a weight of its own
        weights = {tensor.data_ptr(): tensor for tensor in stored.values()}
        layouts = {address: layout_of(weight) for address, weight in weights.items()}
        return plan.bytes - sum(weights[address].nbytes - kept.bytes for address, kept in layouts.items() if kept)

    def usage(self, outline: Outline, tokenizer: str, imports: Sequence[str] = ()) -> str:
        """Returns the lines of Python that open the folder, and how it is unpacked."""
        others = [line for line in imports if not line.startswith("import lit_prune ")]
        return hugging_face.usage(outline, tokenizer, [*others, IMPORT], NOTE)
