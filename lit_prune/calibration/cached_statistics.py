"""Statistics in a file: computed once by `lit-prune score`, read by every cut of the same model on the same text.

The file is safetensors: norms and Gram matrices as tensors; cosines, scores and the key as JSON in its metadata. The
key identifies weights, text and versions; statistics of others are refused with a list of the differences.
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
    """The identity of statistics: which model, which tokens, which versions.

    Attributes:
        weights: Digest of the model's parameters and of its config.
        tokens: Digest of the calibration batches: the token ids that count.
        versions: Versions of the packages that the numbers depend on.
        settings: How model and windows were named and drawn. They decide nothing, but explain to people why a digest
            differs.
    """

    weights: str
    tokens: str
    versions: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def expected(self, settings: Mapping[str, Any]) -> Key:
        """Returns the key that a cut with ``settings`` will have at best, before weights and text are read.

        Windows of other sizes are other tokens for certain; all else is taken to be the same.
        """
        sizes = ("calibration.num_samples", "calibration.seq_length")
        same = all(self.settings.get(name, settings[name]) == settings[name] for name in sizes)
        return Key(self.weights, self.tokens if same else "", _versions(), dict(settings))

    def differences(self, other: Key) -> list[str]:
        """Returns the differences to ``other`` in words; none where statistics of this key serve for that one."""
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
    """Statistics of every block, and the scores that allocations computed from them.

    Attributes:
        key: The model, tokens and versions that they belong to.
        kinds: The statistics in it: INPUTS, COSINE, GRAM.
        observed: The statistics of each block.
        scores: By the allocation's ``repr``, the score of each block.
        source: The file that they were read from.
    """

    key: Key
    kinds: frozenset[str]
    observed: list[BlockStatistics]
    scores: dict[str, list[float]]
    source: str = "memory"

    def check(self, key: Key, blocks: Sequence[Block], needs: Iterable[str]) -> None:
        """Refuses statistics that do not serve.

        Args:
            key: The key of the cut.
            blocks: The blocks that are cut.
            needs: The kinds of statistics that the cut reads.

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
        if missing := sorted(set(needs) - self.kinds):
            raise InputError(
                f"`pruning.statistics` must hold what is needed, {', '.join(missing)}, {self.source} holds "
                f"{', '.join(sorted(self.kinds))}; run `lit-prune score` with this method and allocation."
            )
        if not self.kinds & set(needs) & {INPUTS, GRAM}:
            return
        for block, observed in zip(blocks, self.observed, strict=True):
            if missing := [name for name in block.linears if name not in observed.shared_inputs]:
                raise InputError(
                    f"`pruning.statistics` must be of all linears that are pruned, {self.source} has none of "
                    f"{missing[0]} of block {block.index}; run `lit-prune score` with these `pruning.targets`."
                )

    def scores_of(self, allocation: object, blocks: Sequence[Block]) -> list[float] | None:
        """Returns the scores that ``allocation`` computed from the same linears; None if there are none."""
        same = all(
            set(block.linears) == set(observed.shared_inputs)
            for block, observed in zip(blocks, self.observed, strict=True)
        )
        return self.scores.get(repr(allocation)) if same else None


def key_of(model: PreTrainedModel, batches: Iterable[Batch | Tensor], settings: Mapping[str, Any] | None = None) -> Key:
    """Returns the key of statistics of ``model`` over ``batches``; ``settings`` as in :class:`Key`."""
    return Key(_weights(model), _tokens(batches), _versions(), dict(settings or {}))


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def write_statistics(path: Path, statistics: CachedStatistics) -> None:
    """Writes a file that :func:`read_statistics` reads; a tensor that linears share is written once."""
    tensors: dict[str, Tensor] = {}
    for block, observed in enumerate(statistics.observed):
        for kind, by_linear in (("norm", observed.norms), ("gram", observed.grams)):
            for name, tensor in by_linear.items():
                if observed.shared_inputs[name] == name:
                    tensors[f"{block}.{kind}.{name}"] = tensor.contiguous()
    metadata = {
        "key": vars(statistics.key),
        "taken": sorted(statistics.kinds),
        "cosines": [observed.cosine for observed in statistics.observed],
        "shared_inputs": [observed.shared_inputs for observed in statistics.observed],
        "scores": statistics.scores,
    }
    save_file(tensors, path, metadata={"lit_prune": json.dumps(metadata)})


def read_statistics(path: str | Path) -> CachedStatistics:
    """Returns the statistics in a file, or in the folder that `lit-prune score` wrote.

    Raises:
        InputError: if there are none.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(
            f"`pruning.statistics` must be a file that exists, {file} does not; `lit-prune score` writes it."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads(opened.metadata()["lit_prune"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"`pruning.statistics` must be a file of `lit-prune score`, {file} is none.") from error
    cosines, shared = metadata["cosines"], metadata["shared_inputs"]
    observed = [
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
        observed=observed,
        scores=metadata["scores"],
        source=str(file),
    )


def _by_linear(tensors: dict[str, Tensor], prefix: str, shared_inputs: dict[str, str]) -> dict[str, Tensor]:
    """The tensors by linear: that of the first linear with the same input, which is the one in the file."""
    return {name: tensors[prefix + first] for name, first in shared_inputs.items() if prefix + first in tensors}


@torch.no_grad()
def _weights(model: PreTrainedModel) -> str:
    """The digest of every parameter, tied ones once, and of the config, which may change the function they compute."""
    whole = hashlib.sha256()
    for name, tensor in model.named_parameters():
        whole.update(f"{name} {digest(tensor)} ".encode())
    config = model.config.to_dict()
    for unrelated in ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures", "lit_prune"):
        config.pop(unrelated, None)
    whole.update(json.dumps(config, sort_keys=True, default=str).encode())
    return whole.hexdigest()


def _tokens(batches: Iterable[Batch | Tensor]) -> str:
    """The digest of all rows and their attention masks, however they are batched."""
    digest = hashlib.sha256()
    for batch in batches:
        ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        for row, row_mask in zip(ids, mask, strict=True):
            digest.update(repr((row.tolist(), row_mask.bool().tolist())).encode())
    return digest.hexdigest()
