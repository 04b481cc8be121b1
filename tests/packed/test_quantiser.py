"""transformers opens a packed folder after `import lit_prune`, as the ordinary one, and refuses one that is damaged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from lit_prune.export.formats import HuggingFace, Packed
from lit_prune.export.plan import ExportPlan
from lit_prune.packed.unpack import CONFIG, FILE_FIELD, METHOD, QUANTIZATION, Damaged
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe

IDS = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(1))


def folders(model: PreTrainedModel, path: Path) -> tuple[Path, Path]:
    """An ordinary folder of the model, pruned, and the same packed."""
    prune(model, [IDS], Recipe(Magnitude(), 0.5))
    plan = ExportPlan.of(model)
    HuggingFace().write(plan, path / "ordinary")
    Packed().write(plan, path / "packed")
    return path / "ordinary", path / "packed"


def test_every_family_opens_as_the_ordinary_folder(any_model: PreTrainedModel, tmp_path: Path) -> None:
    ordinary, packed = folders(any_model.to(torch.bfloat16), tmp_path)  # type: ignore[arg-type]
    expected = AutoModelForCausalLM.from_pretrained(ordinary)
    model, info = AutoModelForCausalLM.from_pretrained(packed, output_loading_info=True)
    assert not any(info.values()), info
    assert not hasattr(model.config, QUANTIZATION)
    assert not hasattr(model.config, FILE_FIELD)
    assert_equal(model, expected)
    model.save_pretrained(tmp_path / "saved")  # it is an ordinary model, and saved as one
    saved, before = (folder / "model.safetensors" for folder in (tmp_path / "saved", ordinary))
    assert saved.read_bytes() == before.read_bytes()


def test_it_opens_in_another_type(model: PreTrainedModel, tmp_path: Path) -> None:
    ordinary, packed = folders(model.to(torch.bfloat16), tmp_path)  # type: ignore[arg-type]
    opened = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (packed, ordinary)]
    assert opened[0].dtype == torch.float32
    assert_equal(*opened)


def assert_equal(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("first", ["import lit_prune", "import transformers.modeling_utils"])
def test_either_package_may_be_imported_first(first: str, model: PreTrainedModel, tmp_path: Path) -> None:
    _, packed = folders(model, tmp_path)
    program = f"""{first}
import lit_prune
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for kind in (AutoModelForCausalLM, LlamaForCausalLM):
    print(int((kind.from_pretrained({str(packed)!r}).model.layers[0].mlp.up_proj.weight == 0).sum()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    zeros = int((model.model.layers[0].mlp.up_proj.weight == 0).sum())
    assert done.stdout.split() == [str(zeros)] * 2


def test_transformers_alone_says_what_to_install_and_loads_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    _, packed = folders(model, tmp_path)
    call = f"LlamaForCausalLM.from_pretrained({str(packed)!r}, ignore_mismatched_sizes=True)"
    program = f"from transformers import LlamaForCausalLM; {call}; print(1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    first, *_, last = done.stderr.splitlines()
    assert "got lit_prune (pip install lit-prune, then import lit_prune) - supported types are" in first
    assert last.startswith("ValueError: The transformers file in the config seems to be incorrect")
    assert last.endswith("these weights are packed by lit_prune (pip install lit-prune, then import lit_prune)")


def test_a_damaged_weight_is_named_before_anything_is_loaded(model: PreTrainedModel, tmp_path: Path) -> None:
    _, packed = folders(model, tmp_path)
    file = packed / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Damaged, match=r"^model\.layers\.\d\.\w+\.\w+\.weight is damaged: "):
        LlamaForCausalLM.from_pretrained(packed)


def test_an_unknown_version(model: PreTrainedModel, tmp_path: Path) -> None:
    _, packed = folders(model, tmp_path)
    config = json.loads((packed / CONFIG).read_text())
    (packed / CONFIG).write_text(json.dumps({**config, QUANTIZATION: {"quant_method": METHOD, "version": 2}}))
    with pytest.raises(ValueError, match=r"^the packed weights have version 2 of the layout, and this program reads"):
        LlamaForCausalLM.from_pretrained(packed)
