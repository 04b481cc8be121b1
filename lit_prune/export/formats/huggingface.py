"""The ordinary Hugging Face folder, which plain ``from_pretrained`` opens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.export.formats.base import ExportFormat
from lit_prune.export.plan import ExportPlan
from lit_prune.models.on_disk import keep_on_disk, save
from lit_prune.models.quantised import compute_exactly


@final
@dataclass(frozen=True)
class HuggingFace(ExportFormat):
    """safetensors, config and tokenizer in a folder that ``AutoModelForCausalLM.from_pretrained`` opens.

    Everything that lit_prune makes fits: masks as zeros, quantised linears as bitsandbytes stores them, sliced models
    with their modeling file. An adapter that is not merged lies at the root of the folder in peft's layout, so that a
    plain ``from_pretrained`` loads pruned weights and adapter together, where peft is installed.
    """

    def write(self, plan: ExportPlan, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes the weights, an adapter that is not merged, and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        if plan.adapter_beside:
            plan.model.save_pretrained(folder)  # of a model that has an adapter transformers saves that alone
            _name_base(folder / "adapter_config.json")
        save(plan.plain, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def open(self, folder: Path, device: torch.device, *, on_disk: bool = False) -> PreTrainedModel:
        """Returns the model as transformers opens it."""
        model = AutoModelForCausalLM.from_pretrained(folder).to(device)  # type: ignore[arg-type]
        compute_exactly(model)
        return keep_on_disk(model) if on_disk else model

    def bytes(self, plan: ExportPlan) -> int:
        """Returns the bytes of the tensors: safetensors adds a header of a few kilobytes."""
        return plan.bytes


def _name_base(adapter: Path) -> None:
    """Makes the folder that the adapter lies in its base."""
    config = json.loads(adapter.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "."
    adapter.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
