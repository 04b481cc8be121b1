"""Models bigger than memory: the weights stay in files that are mapped, and one block at a time is in memory.

transformers maps a safetensors file whose tensors need no conversion: its pages are read on first access, and the
operating system drops them when it needs memory. Writing to such a tensor would make a private copy of the page, in
memory that cannot be dropped (anonymous memory, RssAnon on Linux). So a block that is to be changed is copied before,
and afterwards written to a file of its own, which is mapped in turn; no tensor of a mapped file is ever written to.

Anonymous memory is at most

    constant + max(scoring, pruning) + activations

constant: Python and its libraries, and what the measuring of perplexity takes: the logits of one window.
scoring: one block in float32 (what DLP and OWL rank), beside its statistics.
pruning: one block as it is stored, beside the work on the largest group of linears of one input: its result, and of
its largest linear 16 bytes a weight, scores and their ranking (Wanda; Magnitude takes 28), or of the group 12 bytes a
weight and of its input 28 bytes a channel squared, the Gram matrix and its factor (SparseGPT).
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
        """Loads the block at ``path`` onto ``device`` for the context; a changed block is written to a file at its end.

        An exception leaves the weights as they were. Nothing is copied if the block neither changes nor moves.
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
        """Writes a block to a file of its own; returns its parameters as views of that file."""
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
    """Returns ``model``, whose weights are views of mapped files, marked so that they stay there."""
    setattr(model, KEY, Offload())
    return model


def placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Returns ``model`` on ``device``; one on disk stays where it is."""
    return model if on_disk(model) is not None else model.to(device)  # type: ignore[arg-type]


@contextmanager
def offload_folder(model: PreTrainedModel, target: Path) -> Iterator[None]:
    """Makes a temporary folder beside ``target`` for the changed blocks of a model on disk, for the context.

    Within the context, :func:`save` to ``target`` links the blocks' files instead of copying them. After it the model
    still has its weights: they are mapped, so that the system keeps the deleted files. A model in memory needs no
    folder, and gets none.
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
    """Raises InputError for a model on disk that has no folder to write its changed blocks to."""
    offload = on_disk(model)
    if offload is not None and offload.folder is None:
        raise InputError(
            "`model.on_disk` must be false where no folder for changed blocks is given: prune by `lit-prune "
            "prune`, or in Python within `with lit_prune.models.on_disk.offload_folder(model, target):`."
        )


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes ``model`` into ``folder`` as ``save_pretrained`` does, the changed blocks of a model on disk included.

    A changed block's file becomes a shard by a link, or a copy where the file system has no links. What belongs to no
    changed block is the last shard.
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
    """Gives a file a second name; a copy where the file system cannot."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
