"""The verbs and options of the command, read without importing the classes that define them.

Importing torch, Lightning and transformers takes seconds, and neither ``--help`` nor the error for a mistyped option
should wait for them. The options of groups and the help of verbs are parsed from the source of the classes.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lit_prune.errors import near_misses

# By verb, the parameters of PruneTrainer's method that the command passes itself.
VERBS: dict[str, set[str]] = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
    "validate": {"model", "dataloaders", "datamodule"},
    "test": {"model", "dataloaders", "datamodule"},
    "prune": {"model", "datamodule"},
    "score": {"model", "datamodule"},
    "export": {"model", "datamodule"},
    "evaluate": {"model", "datamodule"},
}
# By verb that takes a folder and no settings, its summary; it is not a method of PruneTrainer.
FOLDER_VERBS = {"unpack": "Write the ordinary Hugging Face folder of one that was packed by `--format packed`."}
WRITES = ("fit", "prune", "export")  # verbs that write a model
DESCRIPTION = "Prune a large language model while it is fine-tuned, and recover its quality in the same run."


@dataclass(frozen=True)
class Option:
    """An option outside the groups.

    Args:
        name: Name without dashes.
        type: Type of the value; bool is a switch.
        default: Value when the option is not given.
        help: Text for ``--help``.
    """

    name: str
    type: Any
    default: Any
    help: str


OPTIONS = (
    Option("output", str, "runs/lit_prune", "Folder that the results are written to."),
    Option("overwrite", bool, False, "Replace the output folder if it exists."),
    Option(
        "checkpoint_every",
        int,
        50,
        "Number of optimizer steps between checkpoints; `--ckpt_path last` resumes an interrupted run from the last.",
    ),
    Option(
        "push_to_hub",
        str | None,
        None,
        "Repository on the Hugging Face Hub to upload the model folder to, such as name/model.",
    ),
    Option(
        "export.dtype",
        Literal["float32", "bfloat16", "float16"] | None,
        None,
        "Data type of the exported weights; null is that of the files that the model was loaded from, if it was "
        "trained in a wider one, and else the one that it was trained in (fit, prune, export).",
    ),
    Option(
        "tasks",
        str | list[str] | None,
        None,
        "Tasks of lm-eval to evaluate the model on, such as arc_easy,piqa, or YAML files (fit, prune, export, "
        "evaluate).",
    ),
)

TRAINER = ("lit_prune.cli.trainer", "PruneTrainer")
# By group of options, the module and class whose parameters they are.
GROUPS = {
    "model": ("lit_prune.fit.module", "PrunableLM"),
    "data": ("lit_prune.data.datamodule", "TextDataModule"),
    "pruning": ("lit_prune.callbacks.dynamic_pruning", "DynamicPruningCallback"),
    "lm_eval": ("lit_prune.evaluation.tasks", "HarnessSettings"),
    "trainer": ("lightning.pytorch.trainer.trainer", "Trainer"),
}
# By group of options that are nested deeper, their module and class; for suggestions.
NESTED = {
    "pruning.calibration": ("lit_prune.calibration.windows", "Calibration"),
    "format": ("lit_prune.export.formats.gguf", "GGUF"),
}
# By the name of an option in transformers, llama.cpp and others, what it is here.
ELSEWHERE = {
    "gguf": "--format gguf",
    "learning_rate": "--model.lr",
    "model_name_or_path": "--model.pretrained",
    "packed": "--format packed",
    "per_device_train_batch_size": "--data.batch_size",
    "ratio": "--pruning.sparsity",
    "seed": "--seed_everything",
}
CLASS_OPTIONS = ("--format",)  # outside the groups; the settings of the class are nested below
# LightningCLI's and jsonargparse's own.
BUILT_IN = ("--help", "--config", "--print_config", "--seed_everything")


def summary(verb: str) -> str:
    """Returns the first line of the docstring of a verb."""
    return (ast.get_docstring(_methods(*TRAINER)[verb]) or "").partition("\n")[0]


def options(verb: str) -> set[str]:
    """Returns the options of ``verb``, such as ``--output`` and ``--pruning.sparsity``, without those nested deeper.

    Raises:
        LookupError: if a class is not where it is expected, as may happen with a future release of Lightning.
    """
    names = {f"--{option.name}" for option in OPTIONS} | {*BUILT_IN, *CLASS_OPTIONS}
    names |= {f"--{name}" for name in _parameters(_methods(*TRAINER)[verb]) if name not in VERBS[verb]}
    for group, (module, name) in GROUPS.items():
        names |= {f"--{group}"} | {f"--{group}.{field}" for field in _fields(module, name)}
    return names


def suggestions(name: str, verb: str) -> list[str]:
    """Returns options of ``verb`` that ``name`` may have meant, best first; --lr is --model.lr.

    Those with the same last part come first, then those that are called so elsewhere, then those that are spelt alike.
    """
    known = options(verb)
    last = name.removeprefix("--").rpartition(".")[2]
    nested = {f"--{group}.{field}" for group, place in NESTED.items() for field in _fields(*place)}
    same = sorted(option for option in known | nested if "." in option and option.rpartition(".")[2] == last)
    if last in ELSEWHERE:
        return [ELSEWHERE[last], *same]
    return same or near_misses(name, known)


def _fields(module: str, name: str) -> list[str]:
    """Returns the parameters of a class: those of its ``__init__``, or the fields of a dataclass."""
    methods = _methods(module, name)
    if "__init__" in methods:
        return _parameters(methods["__init__"])
    body = _class(module, name).body
    return [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]


def _parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs) if argument.arg != "self"]


def _methods(module: str, name: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in _class(module, name).body if isinstance(node, ast.FunctionDef)}


@cache
def _class(module: str, name: str) -> ast.ClassDef:
    for node in ast.parse(_path(module).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{module} has no class {name}")


def _path(module: str) -> Path:
    """Returns the file of a module; ``importlib.util.find_spec`` would import its parent packages."""
    parts, locations, origin = module.split("."), None, None
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        specs = (finder.find_spec(name, locations) for finder in sys.meta_path)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            raise LookupError(f"{name} is not installed")
        locations, origin = spec.submodule_search_locations, spec.origin
    return Path(str(origin))
