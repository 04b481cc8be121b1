"""Statistics in a file: taken once by `lit-prune score`, read by every cut of the same model on the same text.

The file is safetensors: norms and Gram matrices as tensors; cosines, scores and the key as JSON in its metadata. The
key says what they were taken of; statistics of other weights, text or versions are refused, and what differs is said.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_prune.calibration.statistics import GRAM, INPUTS, BlockStatistics
from lit_prune.calibration.windows import Batch
from lit_prune.errors import InputError
from lit_prune.models.digest import digest
from lit_prune.models.families import Block

FILE = "statistics.safetensors"
PACKAGES = ("lit_prune", "torch", "transformers")


@dataclass(frozen=True)
class Key:
    """What statistics were taken of.

    Attributes:
        weights: Digest of the model's parameters and of its config.
        tokens: Digest of the calibration batches: the token ids that count.
        versions: Of the packages that the numbers hang on.
        settings: How model and windows were named and drawn; tells people what differs where a digest does.
    """

    weights: str
    tokens: str
    versions: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def unread(self, settings: Mapping[str, Any]) -> Key:
        """Returns what the key of a cut with ``settings`` will be at best: windows of other sizes are other tokens."""
        sizes = ("calibration.num_samples", "calibration.seq_length")
        same = all(self.settings.get(name, settings[name]) == settings[name] for name in sizes)
        return Key(self.weights, self.tokens if same else "", _versions(), dict(settings))

    def differences(self, other: Key) -> list[str]:
        """Returns what is another in ``other``, in words; nothing where the statistics serve."""
        told = [
            f"`{name}` {self.settings.get(name)}, now {value}"
            for name, value in other.settings.items()
            if self.settings.get(name) != value
        ]
        found = [
            f"{name} {self.versions.get(name)}, now {version}"
            for name, version in other.versions.items()
            if self.versions.get(name) != version
        ]
        if self.weights != other.weights:
            found.append("other weights")
        if self.tokens != other.tokens:
            found.append("other calibration tokens")
        return found + told if found else []


@dataclass(frozen=True)
class CachedStatistics:
    """Statistics of every block, and the scores that allocations made of them.

    Attributes:
        key: What they were taken of.
        taken: Which statistics there are, of those in ``lit_prune.calibration.stream``.
        observed: One a block.
        scores: By the allocation's ``repr``, one score a block.
        source: Where they were read from.
    """

    key: Key
    taken: frozenset[str]
    observed: list[BlockStatistics]
    scores: dict[str, list[float]]
    source: str = "memory"

    def check(self, key: Key, blocks: Sequence[Block], needs: Iterable[str]) -> None:
        """Asks whether the statistics serve.

        Raises:
            InputError: if they are of another model or text, lack one of ``needs``, or a block or linear of ``blocks``.
        """
        if differing := self.key.differences(key):
            raise InputError(
                f"`pruning.statistics` must be of this model and this calibration text, {self.source} is of others: "
                f"{'; '.join(differing)}. Run `lit-prune score` again, or leave it out."
            )
        if len(blocks) != len(self.observed):
            raise InputError(
                f"`pruning.statistics` must be of this model, which has {len(blocks)} blocks, {self.source} is of "
                f"{len(self.observed)}. Run `lit-prune score` again, or leave it out."
            )
        if missing := sorted(set(needs) - self.taken):
            raise InputError(
                f"`pruning.statistics` must hold what is needed, {', '.join(missing)}, {self.source} holds "
                f"{', '.join(sorted(self.taken))}; run `lit-prune score` with this method and allocation."
            )
        if not self.taken & set(needs) & {INPUTS, GRAM}:
            return
        for block, observed in zip(blocks, self.observed, strict=True):
            if strangers := [name for name in block.linears if name not in observed.shared_inputs]:
                raise InputError(
                    f"`pruning.statistics` must be of all linears that are pruned, {self.source} has none of "
                    f"{strangers[0]} of block {block.index}; run `lit-prune score` with these `pruning.targets`."
                )

    def scores_of(self, allocation: object, blocks: Sequence[Block]) -> list[float] | None:
        """Returns the scores that ``allocation`` made of the same linears; None where they are not there."""
        same = all(
            set(block.linears) == set(seen.shared_inputs) for block, seen in zip(blocks, self.observed, strict=True)
        )
        return self.scores.get(repr(allocation)) if same else None


def key_of(model: PreTrainedModel, batches: Iterable[Batch | Tensor], settings: Mapping[str, Any] | None = None) -> Key:
    """Returns the key of statistics of ``model`` over ``batches``; ``settings`` as in :class:`Key`."""
    return Key(_weights(model), _tokens(batches), _versions(), dict(settings or {}))


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def write_statistics(path: Path, stored: CachedStatistics) -> None:
    """Writes a file that :func:`read_statistics` reads."""
    tensors: dict[str, Tensor] = {}
    for block, observed in enumerate(stored.observed):
        for kind, found in (("norm", observed.norms), ("gram", observed.grams)):
            for name, tensor in found.items():
                if observed.shared_inputs[name] == name:
                    tensors[f"{block}.{kind}.{name}"] = tensor.contiguous()
    told = {
        "key": vars(stored.key),
        "taken": sorted(stored.taken),
        "cosines": [observed.cosine for observed in stored.observed],
        "shared_inputs": [observed.shared_inputs for observed in stored.observed],
        "scores": stored.scores,
    }
    save_file(tensors, path, metadata={"lit_prune": json.dumps(told)})


def read_statistics(path: str | Path) -> CachedStatistics:
    """Returns the statistics in a file, or in the folder that `lit-prune score` wrote.

    Raises:
        InputError: if there are none.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"`pruning.statistics` must be there, {file} is not; `lit-prune score` writes it.")
    try:
        with safe_open(file, framework="pt") as opened:
            told = json.loads(opened.metadata()["lit_prune"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"`pruning.statistics` must be a file of `lit-prune score`, {file} is none.") from error
    observed = [
        BlockStatistics(
            norms=_of_all(tensors, f"{block}.norm.", shared_inputs),
            cosine=cosine,
            grams=_of_all(tensors, f"{block}.gram.", shared_inputs),
            shared_inputs=shared_inputs,
        )
        for block, (cosine, shared_inputs) in enumerate(zip(told["cosines"], told["shared_inputs"], strict=True))
    ]
    return CachedStatistics(Key(**told["key"]), frozenset(told["taken"]), observed, told["scores"], str(file))


def _of_all(tensors: dict[str, Tensor], prefix: str, shared_inputs: dict[str, str]) -> dict[str, Tensor]:
    """By linear, the tensor of the first one that is given the same input."""
    return {name: tensors[prefix + leader] for name, leader in shared_inputs.items() if prefix + leader in tensors}


@torch.no_grad()
def _weights(model: PreTrainedModel) -> str:
    """The digest of every parameter, tied ones once, and of what else the config says of the function."""
    whole = hashlib.sha256()
    for name, tensor in model.named_parameters():
        whole.update(f"{name} {digest(tensor)} ".encode())
    config = model.config.to_dict()
    for passing in ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures", "lit_prune"):
        config.pop(passing, None)
    whole.update(json.dumps(config, sort_keys=True, default=str).encode())
    return whole.hexdigest()


def _tokens(batches: Iterable[Batch | Tensor]) -> str:
    """The digest of all rows, in whatever batches, with what of them counts."""
    digest = hashlib.sha256()
    for batch in batches:
        ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        for row, counts in zip(ids, mask, strict=True):
            digest.update(repr((row.tolist(), counts.bool().tolist())).encode())
    return digest.hexdigest()
