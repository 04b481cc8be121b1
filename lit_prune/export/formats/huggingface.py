"""The ordinary Hugging Face folder, which plain ``from_pretrained`` opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.export.formats import folder as hugging_face
from lit_prune.export.formats.base import ExportFormat
from lit_prune.export.plan import ExportPlan, Outline
from lit_prune.models.on_disk import keep_on_disk


@final
@dataclass(frozen=True)
class HuggingFace(ExportFormat):
    """safetensors, config and tokenizer in a folder that ``AutoModelForCausalLM.from_pretrained`` opens.

    It holds every model that lit_prune makes: pruned weights as zeros, quantised linears as bitsandbytes stores them,
    sliced models with their modeling file. An adapter that is not merged is saved at the root of the folder in peft's
    layout, so that ``from_pretrained`` loads pruned weights and adapter together if peft is installed.
    """

    def write(self, plan: ExportPlan, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes the weights, the adapter if it is not merged, and the tokenizer."""
        hugging_face.write_folder(plan, folder, tokenizer)

    def open(
        self,
        folder: Path,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        on_disk: bool = False,
        trust_remote_code: bool = False,
    ) -> PreTrainedModel:
        """Returns the model as transformers opens it."""
        model = hugging_face.open_folder(folder, device, dtype, trust_remote_code)
        return keep_on_disk(model) if on_disk else model

    def bytes(self, plan: ExportPlan) -> int:
        """Returns the bytes of the tensors, without the few kilobytes of the header of safetensors."""
        return plan.bytes

    def usage(self, outline: Outline, tokenizer: str, imports: Sequence[str] = ()) -> str:
        """Returns the lines of Python that open the folder, the packages they need and the version they were run on."""
        return hugging_face.usage(outline, tokenizer, imports)
