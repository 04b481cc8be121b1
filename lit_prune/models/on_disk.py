"""Models bigger than memory: the weights stay in files that are mapped, and one block at a time is in memory.

transformers maps a safetensors file whose tensors it need not convert: its pages are read when they are asked for, and
the system takes them back when it needs room. What is written to such a tensor is a private copy, in memory that cannot
be taken back (anonymous memory, RssAnon on Linux). So a block that is to be changed is copied before, and afterwards
written to a file of its own, which is mapped in its turn; no tensor of a mapped file is ever written to.

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
from lit_prune.files import written_aside

KEY = "lit_prune_on_disk"
HOME = torch.device("cpu")


class OnDisk:
    """Where the blocks are of a model whose weights stay on disk.

    Attributes:
        folder: Where changed blocks are written; None outside of :func:`working`.
        files: The file of every block that was changed there, by the block's path in the model.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.files: dict[str, Path] = {}

    @contextmanager
    def lent(self, path: str, module: nn.Module, device: torch.device, *, changes: bool) -> Iterator[None]:
        """Has the block at ``path`` on ``device``; what is changed there is written to a file of the block's own.

        After an exception its weights are what they were. Where nothing changes and nothing moves, nothing is copied.
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
            module.to(HOME)

    def _rewritten(self, path: str, module: nn.Module) -> dict[nn.Parameter, Tensor]:
        """Writes a block to a file of its own; returns its parameters as views of that file."""
        assert self.folder is not None
        parameters = {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
        file = self.folder / f"{path}.safetensors"
        tensors = {name: parameter.detach().to(HOME).contiguous() for name, parameter in parameters.items()}
        with written_aside(file) as draft:  # a file of that name may be mapped
            save_file(tensors, draft, {"format": "pt"})
        self.files[path] = file
        with safe_open(file, framework="pt") as stored:
            return {parameter: stored.get_tensor(name) for name, parameter in parameters.items()}


def on_disk(model: PreTrainedModel) -> OnDisk | None:
    """Returns where the blocks of ``model`` are if they stay on disk; None for a model in memory."""
    return getattr(model, KEY, None)


def keep_on_disk(model: PreTrainedModel) -> PreTrainedModel:
    """Returns ``model``, whose weights are views of mapped files, marked so that they stay there."""
    setattr(model, KEY, OnDisk())
    return model


def placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Returns ``model`` on ``device``; one on disk stays where it is."""
    return model if on_disk(model) is not None else model.to(device)  # type: ignore[arg-type]


@contextmanager
def working(model: PreTrainedModel, target: Path) -> Iterator[None]:
    """Gives the changed blocks of a model on disk a folder beside ``target``, which is gone when the context ends.

    What is exported to ``target`` within the context takes the blocks' files over. After it the model still has its
    weights, as files without a name. Nothing happens for a model in memory.
    """
    home = on_disk(model)
    if home is None:
        yield
        return
    parent = target.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.blocks-", dir=parent) as folder:
        home.folder, home.files = Path(folder), {}
        try:
            yield
        finally:
            home.folder, home.files = None, {}


def check_working(model: PreTrainedModel) -> None:
    """Raises InputError for a model on disk that has nowhere to write its changed blocks."""
    home = on_disk(model)
    if home is not None and home.folder is None:
        raise InputError(
            "`model.on_disk` must be false where nothing says where changed blocks are written: prune by `lit-prune "
            "prune`, or in Python within `with lit_prune.models.on_disk.working(model, target):`."
        )


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes ``model`` into ``folder`` as ``save_pretrained`` does; of a model on disk the changed blocks are there.

    A changed block's file becomes a shard by a link, or a copy where the file system has no links. What belongs to no
    changed block is the last shard.
    """
    home = on_disk(model)
    if home is None or not home.files:
        model.save_pretrained(folder)
        return
    shards = {file: _bytes_by_name(file) for file in home.files.values()}
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
