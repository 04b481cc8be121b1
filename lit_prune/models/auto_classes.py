"""Registers sliced and shrunk models with transformers' Auto classes, without importing transformers or torch to do so.

transformers has no entry point for models of other packages: they have to be registered by a call. That call cannot be
made as soon as the auto module is imported, because transformers imports it halfway through modeling_utils, which
these models need complete. The first ``AutoConfig.from_pretrained``, which every Auto class begins with, is late
enough.
"""

from __future__ import annotations

import functools
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register_on_first_use() -> None:
    """Patches ``AutoConfig.from_pretrained`` so that its first call registers these models."""
    if AUTO_CONFIG in sys.modules:
        _wrap(sys.modules[AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _Finder())


def _wrap(module: ModuleType) -> None:
    auto_config: Any = module.AutoConfig
    original = auto_config.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        auto_config.from_pretrained = original
        import lit_prune.models.remote_code.modeling_shrunk
        import lit_prune.models.remote_code.modeling_sliced  # noqa: F401 (both register their classes)

        return cls.from_pretrained(*args, **kwargs)

    auto_config.from_pretrained = classmethod(from_pretrained)


class _Finder(MetaPathFinder):
    """Finder that lets the auto module be imported as usual, and patches it right after; used once."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _WrappingLoader(spec.loader)
        return spec


class _WrappingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _wrap(module)
