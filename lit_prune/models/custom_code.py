"""Custom code: Python files in a model's folder or repository that transformers runs to open it."""

from __future__ import annotations

import os

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from lit_prune.errors import InputError


def runs_custom_code(model: PreTrainedModel) -> bool:
    """Returns whether the class of ``model`` comes from custom code, which was run with the user's consent."""
    return any(kind.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.") for kind in type(model).__mro__)


def custom_code_error(source: str) -> InputError:
    """Returns the error for the folder or hub id of what cannot be opened without its custom code."""
    return InputError(
        f"`model.trust_remote_code` must be true for {source!r}, which cannot be opened without running code of its "
        f"own ({', '.join(_files(source))}): read that code first, or use a model of a family that transformers "
        "has."
    )


def _files(source: str) -> list[str]:
    """Returns the files with the classes that config.json and tokenizer_config.json name; those they import may follow.

    A class is named as `module.Class`, or as `repository--module.Class` in another repository.
    """
    configs = PreTrainedConfig.get_config_dict(source)[0], get_tokenizer_config(source)
    files = []
    for config in configs:
        for names in dict(config.get("auto_map") or {}).values():
            for name in names if isinstance(names, list | tuple) else [names]:
                repository, _, path = (name or "").rpartition("--")
                file = f"{path.split('.')[0]}.py"
                files += [os.path.join(repository or source, file)] if path else []
    return list(dict.fromkeys(files))
