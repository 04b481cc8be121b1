"""Prune a large language model while it is fine-tuned with PyTorch Lightning, and recover its quality in the same run.

The public names are listed in ``__init__.pyi`` and imported on first access. Importing the package also lets
``AutoModelForCausalLM.from_pretrained`` open the folders of sliced, shrunk and packed models.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

from lit_prune.models.auto_classes import register_on_first_use

_MODULES = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(node, ast.ImportFrom) and node.module != __name__
    for alias in node.names
}
__all__ = ["pipeline", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "pipeline":
        return importlib.import_module("lit_prune.pipeline")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_on_first_use()
