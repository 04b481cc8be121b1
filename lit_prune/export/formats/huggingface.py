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

ADAPTER_CONFIG = "adapter_config.json"
# The base that an adapter beside its weights names. transformers looks for the base in the folder first, where that is
# local. peft's AutoPeftModelForCausalLM opens what is named here: "." would be whatever model stands in the working
# directory, and the folder's own path changes when it is moved. A name that no model can have ends in its error, which
# quotes it. A repository on the hub does know its name, see ``hub.push``.
BASE = "beside this file, open the folder by AutoModelForCausalLM.from_pretrained"


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
            name_base(folder / ADAPTER_CONFIG, BASE)
        save(plan.plain, folder)
        _write_rope_theta(folder / "config.json")
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


def name_base(adapter: Path, base: str) -> None:
    """Writes the name of the base model into the adapter_config.json at ``adapter``."""
    config = json.loads(adapter.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    adapter.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_rope_theta(file: Path) -> None:
    """Adds `rope_theta` to a config.json that has it in `rope_parameters` alone, as transformers 5 writes it.

    transformers 4 reads only `rope_theta`, and without it computes with the family's default, silently. It has no field
    for rotary embeddings that differ by layer type; there `rope_parameters` is a dict of dicts without a theta.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is None or "rope_theta" in config:
        return
    file.write_text(json.dumps({**config, "rope_theta": theta}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
