"""Imports every subpackage: jsonargparse resolves the short name of a class only once that has been imported."""

from __future__ import annotations

import importlib
import pkgutil

import lit_prune


def import_subpackages() -> None:
    """Imports all subpackages of lit_prune, whose ``__init__`` import the classes that have short names."""
    for module in pkgutil.iter_modules(lit_prune.__path__, "lit_prune."):
        if module.ispkg and module.name != "lit_prune.cli":
            importlib.import_module(module.name)


import_subpackages()
