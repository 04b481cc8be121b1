"""Installs the model of a `lit-prune fit` run in the package: ``python tools/install_embedded.py RUN``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lit_prune.models.load import EMBEDDED


def install(run: Path) -> None:
    """Copies the model of a run into the package, with weights in bfloat16."""
    AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.bfloat16).save_pretrained(EMBEDDED)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/install_embedded.py RUN")
    install(Path(sys.argv[1]))
