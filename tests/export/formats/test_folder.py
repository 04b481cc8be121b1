"""The folder that several formats write; what is in it and how it opens, test_huggingface.py has for every model."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from lit_prune.export.formats.folder import open_folder, usage, write_folder
from lit_prune.export.plan import ExportPlan, Outline


def test_a_folder_opens_in_another_type(model: PreTrainedModel, tmp_path: Path) -> None:
    write_folder(ExportPlan.of(model, torch.bfloat16), tmp_path, None)
    stored = open_folder(tmp_path, torch.device("cpu"), None)
    wide = open_folder(tmp_path, torch.device("cpu"), torch.float32)
    assert (stored.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    for name, tensor in stored.state_dict().items():
        assert torch.equal(wide.state_dict()[name], tensor.float())
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())


def test_a_note_comes_last() -> None:
    text = usage(Outline("full precision", "llama"), "this/folder", ["import first"], "One more thing.")
    assert text.startswith("```python\nimport first\nfrom transformers import AutoModelForCausalLM")
    assert text.endswith("One more thing.")
