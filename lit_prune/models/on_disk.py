"""Models larger than memory: the weights stay in memory-mapped files, and one block at a time is loaded.

transformers maps a safetensors file whose tensors need no conversion: its pages are read on first access, and the
operating system drops them when it needs memory. Writing to such a tensor would make private copies of its pages, in
memory that cannot be dropped (anonymous memory, RssAnon on Linux). So a block is copied before it is changed, and then
saved to a file of its own, which is mapped in turn; no tensor of a mapped file is ever written to.

Anonymous memory is at most

    constant + max(scoring, pruning) + activations

constant: Python and its libraries, and the logits of one window, for measuring the perplexity.
scoring: one block in float32, which DLP and OWL rank, and its statistics.
pruning: one block as it is stored, the pruned weights of the largest group of linears that share an input, and the
method's working memory. Wanda takes 16 bytes per weight of the largest linear, for scores and their ranking; Magnitude
takes 28; SparseGPT takes 12 bytes per weight of the group and 28 bytes per channel squared of its input, for the Gram
matrix and its factor; ADMM takes 40 bytes per weight of the largest linear and 36 per channel squared.
activations: calibration tokens * hidden size, as they are stored. 128 windows of 2048 tokens for a width of 4096 are
2.1 GB in bfloat16.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lit_prune.errors import InputError
from lit_prune.files import atomic_write

KEY = "lit_prune_on_disk"
CPU = torch.device("cpu")


class Offload:
    """The files of a model whose weights stay on disk.

    Attributes:
        folder: Where changed blocks are written; None outside of :func:`offload_folder`.
        files: The file of every block that was changed, by the block's path in the model.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.files: dict[str, Path] = {}

    @contextmanager
    def onloaded(self, path: str, module: nn.Module, device: torch.device, *, changes: bool) -> Iterator[None]:
        """Loads the block at ``path`` onto ``device`` for the context; saves it to a file at the end if it changes.

        An exception leaves the weights as they were. A block that neither changes nor moves is not copied.
        """
        mapped = {parameter: parameter.data for parameter in module.parameters()}
        try:
            for parameter in mapped if changes else ():
                parameter.data = parameter.data.to(device, copy=True)
            module.to(device)
            yield
            if changes:
                mapped = self._rewritten(path, module)
        finally:
            for parameter, tensor in mapped.items():
                parameter.data = tensor
            module.to(CPU)

    def _rewritten(self, path: str, module: nn.Module) -> dict[nn.Parameter, Tensor]:
        """Saves a block to a file of its own; returns the file's tensors, mapped, by the parameter they replace."""
        assert self.folder is not None
        parameters = {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
        file = self.folder / f"{path}.safetensors"
        tensors = {name: parameter.detach().to(CPU).contiguous() for name, parameter in parameters.items()}
        with atomic_write(file) as draft:  # a file of that name may be mapped
            save_file(tensors, draft, {"format": "pt"})
        self.files[path] = file
        with safe_open(file, framework="pt") as stored:
            return {parameter: stored.get_tensor(name) for name, parameter in parameters.items()}


def on_disk(model: PreTrainedModel) -> Offload | None:
    """Returns the files of ``model`` if its weights stay on disk; None for a model in memory."""
    return getattr(model, KEY, None)


def keep_on_disk(model: PreTrainedModel) -> PreTrainedModel:
    """Marks ``model``, whose weights are views of mapped files, as one on disk, and returns it."""
    setattr(model, KEY, Offload())
    return model


def placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Moves ``model`` to ``device`` and returns it; a model on disk is not moved."""
    return model if on_disk(model) is not None else model.to(device)  # type: ignore[arg-type]


@contextmanager
def offload_folder(model: PreTrainedModel, target: Path) -> Iterator[None]:
    """Creates a temporary folder beside ``target`` for the changed blocks of a model on disk, for the context.

    Being beside ``target``, it is on the same file system, so that :func:`save` can link the blocks' files instead of
    copying them. The model keeps its weights after the context, since the system keeps deleted files while they are
    mapped. Nothing is created for a model in memory.
    """
    offload = on_disk(model)
    if offload is None:
        yield
        return
    parent = target.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.blocks-", dir=parent) as folder:
        offload.folder, offload.files = Path(folder), {}
        try:
            yield
        finally:
            offload.folder, offload.files = None, {}


def check_offload_folder(model: PreTrainedModel) -> None:
    """Raises InputError for a model on disk without a folder for changed blocks."""
    offload = on_disk(model)
    if offload is not None and offload.folder is None:
        raise InputError(
            "`model.on_disk` must be false where no folder for changed blocks is given: prune by `lit-prune "
            "prune`, or in Python within `with lit_prune.models.on_disk.offload_folder(model, target):`."
        )


def save(model: PreTrainedModel, folder: Path) -> None:
    """Saves ``model`` to ``folder`` as ``save_pretrained`` does, including the changed blocks of a model on disk.

    Each changed block's file is linked as a shard (copied if the file system has no links); all other tensors are the
    last shard.
    """
    offload = on_disk(model)
    if offload is None or not offload.files:
        model.save_pretrained(folder)
        return
    shards = {file: _bytes_by_name(file) for file in offload.files.values()}
    changed = {name for names in shards.values() for name in names}
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in changed}
    model.save_pretrained(folder, state_dict=rest, max_shard_size=sum(tensor.nbytes for tensor in rest.values()))
    last = folder / SAFE_WEIGHTS_NAME
    shards[last] = _bytes_by_name(last)
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(shards.items(), start=1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _link(file, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    last.unlink()
    total = sum(size for names in shards.values() for size in names.values())
    size = {"total_parameters": model.num_parameters(), "total_size": total}
    index = json.dumps({"metadata": size, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index, encoding="utf-8")


def _bytes_by_name(file: Path) -> dict[str, int]:
    with safe_open(file, framework="pt") as stored:
        return {name: stored.get_tensor(name).nbytes for name in stored.keys()}  # noqa: SIM118 (no mapping)


def _link(file: Path, target: Path) -> None:
    """Links ``target`` to a file; copies the file if the file system has no links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
