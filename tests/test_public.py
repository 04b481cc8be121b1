"""The names that ``from lit_prune import ...`` offers, and what importing the package costs."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lit_prune
from lit_prune.pruning import Wanda
from lit_prune.slice import Slicing
from tests.conftest import small_model

NAMES = [
    "ADMM",
    "AlphaPruning",
    "Allocation",
    "Arithmetic",
    "Calibration",
    "Copy",
    "Cubic",
    "DLP",
    "Depth",
    "Distillation",
    "DynamicPruningCallback",
    "Experts",
    "FullFineTuning",
    "HeadGroups",
    "HiddenWidth",
    "InputError",
    "Instructions",
    "LayerRedundancy",
    "Linear",
    "LoRA",
    "MLPWidth",
    "Magnitude",
    "MaskedLoRA",
    "Method",
    "MixedNofM",
    "NofM",
    "OWL",
    "OneShot",
    "Pattern",
    "Plan",
    "PrunableLM",
    "QLoRA",
    "Recipe",
    "Reconstruct",
    "Recovery",
    "ResultsCallback",
    "RunCheckpoint",
    "Schedule",
    "Search",
    "Shrink",
    "Slicing",
    "SparseDelta",
    "SparseGPT",
    "Teacher",
    "TextDataModule",
    "TopK",
    "Uniform",
    "Unstructured",
    "Wanda",
    "find_sparsity",
    "keep_zeros",
    "pipeline",
    "prune",
    "score",
]


def test_the_public_names_are_frozen_and_importable() -> None:
    assert sorted(lit_prune.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(lit_prune))
    for name in NAMES:
        value = getattr(lit_prune, name)
        assert value.__name__.rpartition(".")[2] == name
        assert isinstance(value, ModuleType) == (name == "pipeline")  # a module of the same name would hide a function
    assert lit_prune.Wanda is Wanda
    with pytest.raises(AttributeError, match="has no attribute 'Wnda'"):
        lit_prune.Wnda  # noqa: B018


def python(*lines: str) -> str:
    code = "\n".join(lines)
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers', 'lightning', 'jsonargparse'}"
    assert python("import sys, lit_prune", f"print({heavy} & sys.modules.keys())") == "set()"


@pytest.mark.parametrize("first", ["lit_prune", "transformers.models.llama.modeling_llama"])
def test_auto_classes_open_a_sliced_folder_whichever_package_is_imported_first(first: str, tmp_path: Path) -> None:
    model = small_model()
    lit_prune.pipeline.prune(
        model, [model.dummy_inputs["input_ids"]], lit_prune.Recipe(Slicing(), 0.25, lit_prune.Uniform())
    )
    model.save_pretrained(tmp_path)
    name = python(
        f"import {first}, lit_prune, transformers.models.llama.modeling_llama",
        "from transformers import AutoModelForCausalLM",
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__module__)",
    )
    assert name == "lit_prune.models.remote_code.modeling_sliced"
