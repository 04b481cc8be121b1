"""Statistics in a file, written by `lit-prune score` and read by any later cut of the same model on the same text.

The file is safetensors: norms and Gram matrices as tensors; cosines, scores and the key as JSON in its metadata. The
key identifies weights, text and versions; a cut whose key differs raises an error that lists the differences.
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
from lit_prune.models.families import Block
from lit_prune.models.tensors import digest

FILE = "statistics.safetensors"
PACKAGES = ("lit_prune", "torch", "transformers")


@dataclass(frozen=True)
class Key:
    """The identity of statistics: the model, the tokens and the package versions that they depend on.

    Attributes:
        weights: Digest of the model's parameters and of its config.
        tokens: Digest of the token ids and attention masks of the calibration batches.
        versions: Versions of the packages that the numbers depend on.
        settings: The settings of the model and the windows. Keys may differ in them; they only explain in messages why
            a digest differs.
    """

    weights: str
    tokens: str
    versions: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def expected(self, settings: Mapping[str, Any]) -> Key:
        """Returns the key of a cut with ``settings`` before weights and text are read, assuming that they are the same.

        The tokens differ for certain if the windows have other sizes; everything else is assumed to be equal.
        """
        sizes = ("calibration.num_samples", "calibration.seq_length")
        same = all(self.settings.get(name, settings[name]) == settings[name] for name in sizes)
        return Key(self.weights, self.tokens if same else "", _versions(), dict(settings))

    def differences(self, other: Key) -> list[str]:
        """Returns the differences to ``other`` as text, none if statistics of this key are valid for it."""
        settings = [
            f"`{name}` {self.settings.get(name)}, now {value}"
            for name, value in other.settings.items()
            if self.settings.get(name) != value
        ]
        differences = [
            f"{name} {self.versions.get(name)}, now {version}"
            for name, version in other.versions.items()
            if self.versions.get(name) != version
        ]
        if self.weights != other.weights:
            differences.append("other weights")
        if self.tokens != other.tokens:
            differences.append("other calibration tokens")
        return differences + settings if differences else []


@dataclass(frozen=True)
class CachedStatistics:
    """The statistics of every block, and the scores that allocations computed from them.

    Attributes:
        key: The model, tokens and versions that they belong to.
        kinds: The kinds of statistics: INPUTS, COSINE, GRAM.
        by_block: The statistics of each block.
        scores: The score of each block, by the allocation's ``repr``.
        source: The file that they were read from, for messages.
    """

    key: Key
    kinds: frozenset[str]
    by_block: list[BlockStatistics]
    scores: dict[str, list[float]]
    source: str = "memory"

    def check(self, key: Key, blocks: Sequence[Block], needs: Iterable[str]) -> None:
        """Raises InputError if a cut cannot use the statistics.

        Args:
            key: The key of the cut.
            blocks: The blocks that are cut.
            needs: The kinds of statistics that the cut needs.

        Raises:
            InputError: if they belong to another model or text, or lack one of ``needs``, a block or a linear.
        """
        if differing := self.key.differences(key):
            raise InputError(
                f"`pruning.statistics` must be of this model and this calibration text, {self.source} differs: "
                f"{'; '.join(differing)}. Run `lit-prune score` again, or leave it out."
            )
        if len(blocks) != len(self.by_block):
            raise InputError(
                f"`pruning.statistics` must be of this model, which has {len(blocks)} blocks, {self.source} is of "
                f"{len(self.by_block)}. Run `lit-prune score` again, or leave it out."
            )
        if missing := sorted(set(needs) - self.kinds):
            raise InputError(
                f"`pruning.statistics` must hold {', '.join(missing)}, which this cut needs, {self.source} holds "
                f"{', '.join(sorted(self.kinds))}. Run `lit-prune score` with this method and allocation."
            )
        if not self.kinds & set(needs) & {INPUTS, GRAM}:
            return
        for block, statistics in zip(blocks, self.by_block, strict=True):
            if missing := [name for name in block.linears if name not in statistics.shared_inputs]:
                raise InputError(
                    f"`pruning.statistics` must cover all linears that are pruned, {self.source} lacks {missing[0]} of "
                    f"block {block.index}. Run `lit-prune score` with these `pruning.targets`."
                )

    def scores_of(self, allocation: object, blocks: Sequence[Block]) -> list[float] | None:
        """Returns the cached scores of ``allocation`` if they are of the same linears, else None."""
        same = all(
            set(block.linears) == set(statistics.shared_inputs)
            for block, statistics in zip(blocks, self.by_block, strict=True)
        )
        return self.scores.get(repr(allocation)) if same else None


def key_of(model: PreTrainedModel, batches: Iterable[Batch | Tensor], settings: Mapping[str, Any] | None = None) -> Key:
    """Returns the key of statistics of ``model`` over ``batches``; ``settings`` as in :class:`Key`."""
    return Key(_weights(model), _tokens(batches), _versions(), dict(settings or {}))


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def write_statistics(path: Path, statistics: CachedStatistics) -> None:
    """Writes statistics for :func:`read_statistics`; a tensor that linears share is written once."""
    tensors: dict[str, Tensor] = {}
    for index, block in enumerate(statistics.by_block):
        for kind, by_linear in (("norm", block.norms), ("gram", block.grams)):
            for name, tensor in by_linear.items():
                if block.shared_inputs[name] == name:
                    tensors[f"{index}.{kind}.{name}"] = tensor.contiguous()
    metadata = {
        "key": vars(statistics.key),
        "taken": sorted(statistics.kinds),
        "cosines": [block.cosine for block in statistics.by_block],
        "shared_inputs": [block.shared_inputs for block in statistics.by_block],
        "scores": statistics.scores,
    }
    save_file(tensors, path, metadata={"lit_prune": json.dumps(metadata)})


def read_statistics(path: str | Path) -> CachedStatistics:
    """Returns the statistics in a file, or in the folder that `lit-prune score` wrote.

    Raises:
        InputError: if the file does not exist or does not hold statistics.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(
            f"`pruning.statistics` must be a file that exists, {file} does not; `lit-prune score` writes it."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads(opened.metadata()["lit_prune"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    except (SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"`pruning.statistics` must be a file of `lit-prune score`, {file} is not.") from error
    cosines, shared = metadata["cosines"], metadata["shared_inputs"]
    by_block = [
        BlockStatistics(
            norms=_by_linear(tensors, f"{block}.norm.", shared_inputs),
            cosine=cosine,
            grams=_by_linear(tensors, f"{block}.gram.", shared_inputs),
            shared_inputs=shared_inputs,
        )
        for block, (cosine, shared_inputs) in enumerate(zip(cosines, shared, strict=True))
    ]
    return CachedStatistics(
        key=Key(**metadata["key"]),
        kinds=frozenset(metadata["taken"]),
        by_block=by_block,
        scores=metadata["scores"],
        source=str(file),
    )


def _by_linear(tensors: dict[str, Tensor], prefix: str, shared_inputs: dict[str, str]) -> dict[str, Tensor]:
    """The tensors by linear; of linears that share an input, only the first has its tensor in the file."""
    return {name: tensors[prefix + first] for name, first in shared_inputs.items() if prefix + first in tensors}


@torch.no_grad()
def _weights(model: PreTrainedModel) -> str:
    """The digest of all parameters, tied ones once, and of the config, which may change what they compute."""
    whole = hashlib.sha256()
    for name, tensor in model.named_parameters():
        whole.update(f"{name} {digest(tensor)} ".encode())
    config = model.config.to_dict()
    for unrelated in ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures", "lit_prune"):
        config.pop(unrelated, None)
    whole.update(json.dumps(config, sort_keys=True, default=str).encode())
    return whole.hexdigest()


def _tokens(batches: Iterable[Batch | Tensor]) -> str:
    """The digest of all rows and their attention masks, independent of the batch size."""
    digest = hashlib.sha256()
    for batch in batches:
        ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        for row, row_mask in zip(ids, mask, strict=True):
            digest.update(repr((row.tolist(), row_mask.bool().tolist())).encode())
    return digest.hexdigest()
