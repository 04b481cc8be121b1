"""The Hugging Face folder that several formats write and open: weights, adapter, config and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.export.formats.transformers4 import add_earlier_names
from lit_prune.export.plan import ExportPlan, Outline
from lit_prune.models.on_disk import save
from lit_prune.models.quantised import compute_exactly, convert, device_map

ADAPTER_CONFIG = "adapter_config.json"
# The base model that an adapter beside its weights names. In a local folder transformers ignores it and takes the
# folder's weights, but peft's AutoPeftModelForCausalLM opens what is named here. "." would be whatever model is in the
# working directory, and the folder's own path changes when it is moved. So the name is one that no model can have: the
# error that it causes quotes it. On the hub the repository's id is the name, see ``hub.push``.
BASE = "beside this file, open the folder by AutoModelForCausalLM.from_pretrained"
TRIED = "4.57.6"  # an earlier version, with benchmarks/readers.py
TOKENIZER_NOTE = (
    "Without lit_prune, pass `trust_remote_code=False` to the tokenizer, which needs no code: transformers 5 would ask "
    "whether to run that of the model. It then warns that it does not know the type of the model, which does not "
    "change the tokenizer."
)
CUSTOM_CODE_NOTE = "It contains the Python code that came with the model, which opens it."
ADAPTER_NOTE = (
    "The adapter is saved beside the weights. It needs transformers 5 and peft: `from_pretrained` then loads both, "
    "while without peft it loads the weights alone, unrecovered. peft's own `AutoPeftModelForCausalLM` does not open a "
    "local folder of this kind, because the adapter has no base model outside of it."
)
TRAINING_NOTE = """\
Training fills the zeros of these weights. With lit_prune installed, one call before the training, by `Trainer` or any
other code, keeps them:

```python
from lit_prune import keep_zeros

keep_zeros(model)
```"""


def write_folder(plan: ExportPlan, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Writes the weights, the adapter if it is not merged, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    if plan.adapter_beside:
        plan.model.save_pretrained(folder)  # transformers saves only the adapter of a model that has one
        name_base(folder / ADAPTER_CONFIG, BASE)
    save(plan.plain, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    add_earlier_names(folder)


def open_folder(
    folder: Path, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Returns the model as transformers opens it; ``dtype`` is that of the weights, None the stored one."""
    options = {"trust_remote_code": trust_remote_code}
    options |= device_map(AutoConfig.from_pretrained(folder, **options), device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **options)
    model.to(device)  # type: ignore[arg-type]
    if dtype is not None:
        convert(model, dtype)
    compute_exactly(model)
    return model


def usage(outline: Outline, tokenizer: str, imports: Sequence[str], note: str = "") -> str:
    """Returns the lines of Python that open the folder, the packages they need and the version they were run on.

    Args:
        outline: The outline of the exported model.
        tokenizer: Folder or hub id of the tokenizer.
        imports: Lines of Python that are needed first.
        note: A sentence to add.
    """
    lines = [*imports, "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    trust = ", trust_remote_code=True" if outline.custom_code else ""
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("this/folder"{trust})')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{tokenizer}"{trust})')
    notes = [f"This folder was reopened and verified with transformers {transformers.__version__}."]
    if outline.quantised:
        notes.append("Its quantised weights need bitsandbytes.")
    if outline.form == "adapter":
        notes.append(ADAPTER_NOTE)
    elif not outline.reshaped and not note:
        notes.insert(1, f"Folders like it open with transformers {TRIED} too, if that knows the family.")
    notes += [CUSTOM_CODE_NOTE] if outline.custom_code else []
    notes += [TOKENIZER_NOTE] if imports else []
    notes += [note] if note else []
    training = ["", TRAINING_NOTE] if outline.masked and outline.form in ("full precision", "merged") else []
    return "\n".join(["```python", *lines, "```", "", " ".join(notes), *training])


def name_base(adapter: Path, base: str) -> None:
    """Writes the name of the base model into the adapter_config.json at ``adapter``."""
    config = json.loads(adapter.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    adapter.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
