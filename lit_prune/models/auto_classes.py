"""Registers with transformers what it cannot open itself, without importing transformers or torch to do so.

transformers has no entry point for classes of other packages: they have to be registered by a call. Sliced and shrunk
models cannot be registered as soon as the auto module is imported, because transformers imports it halfway through
modeling_utils, which these models need complete. The first ``AutoConfig.from_pretrained``, which every Auto class
begins with, is late enough. The quantiser of packed weights is registered once the module of quantisers is imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
QUANTISERS = "transformers.quantizers.auto"


def register_on_first_use() -> None:
    """Registers with transformers as soon as its modules are there, now or when they are imported."""
    for name, register in {AUTO_CONFIG: _wrap, QUANTISERS: _register_quantiser}.items():
        if name in sys.modules:
            register(sys.modules[name])
        else:
            sys.meta_path.insert(0, _Finder(name, register))


def _register_quantiser(module: ModuleType) -> None:
    import lit_prune.packed.quantiser  # noqa: F401 (registers its classes)


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
    """Finder that lets a module be imported as usual, and registers right after; used once.

    Args:
        name: Name of the module.
        register: Function that is called with the module.
    """

    def __init__(self, name: str, register: Callable[[ModuleType], None]) -> None:
        self.name, self.register = name, register

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self.register)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader, register: Callable[[ModuleType], None]) -> None:
        self.loader, self.register = loader, register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.register(module)
