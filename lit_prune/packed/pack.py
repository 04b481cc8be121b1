"""Packs the pruned weights of a Hugging Face folder; the layout is described in ``unpack``, which reverses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_prune.files import atomic_write
from lit_prune.packed import unpack
from lit_prune.packed.unpack import (
    BITS,
    CHECKSUMS,
    CHUNK,
    CONFIG,
    FILE_FIELD,
    INDEX,
    INTEGERS,
    LAYOUT,
    METHOD,
    NO_FILE,
    QUANTIZATION,
    VERSION,
    checksum,
    code_width,
    combinations,
    count_bits,
    plain_checksum,
)

GROUPS = (4, 8)  # numbers of consecutive weights that are tried as groups with equally many stored ones
NO_GROUPS = (0, 0)
METADATA_BYTES = 40  # of the layout of a matrix
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """The smallest layout of a weight.

    Attributes:
        n: Stored weights in a group; 0 for a mask.
        m: Weights in a group; 0 for a mask.
        stored: Number of stored weights.
        bytes: Bytes of the packed weight.
    """

    n: int
    m: int
    stored: int
    bytes: int


def layout_of(weight: Tensor) -> Layout | None:
    """Returns the smallest layout of ``weight``; None if none is smaller than the weight itself.

    A mask needs one bit per weight and the values that are not zero: half of a matrix in bfloat16 takes 9/16. Groups
    of four with two values each need three bits per group and the values: 0.547.
    """
    if weight.dtype not in FLOATS or weight.ndim < 2 or not weight.numel():
        return None
    candidates = [_layout(weight, *NO_GROUPS, sum(int(keep.sum()) for keep in _kept(weight)))]
    for m in GROUPS:
        if weight.shape[-1] % m == 0:
            n = max(int(keep.view(-1, m).sum(1).max()) for keep in _kept(weight))
            if 0 < n < m:
                candidates.append(_layout(weight, n, m, weight.numel() // m * n))
    best = min(candidates, key=lambda layout: layout.bytes)
    return best if best.bytes < weight.nbytes else None


def _layout(weight: Tensor, n: int, m: int, stored: int) -> Layout:
    bits = (count_bits(weight.numel(), n, m) + 7) // 8
    return Layout(n, m, stored, stored * weight.itemsize + bits + METADATA_BYTES)


def _kept(weight: Tensor) -> Iterator[Tensor]:
    """Yields which weights are not zero, a chunk of them at a time; -0.0 is not zero, since its bits are not."""
    for chunk in weight.contiguous().view(INTEGERS[weight.itemsize]).flatten().split(CHUNK):
        yield chunk != 0


def pack(weight: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the three tensors that ``unpack.unpack`` makes ``weight`` of: values, bits and layout."""
    words = weight.contiguous().view(INTEGERS[weight.itemsize]).flatten().split(CHUNK)
    packed = [_pack_groups(chunk, layout.n, layout.m) if layout.m else _pack_mask(chunk) for chunk in words]
    values, bits = (torch.cat(parts) for parts in zip(*packed, strict=True))
    values = values.view(weight.dtype)
    crc = checksum(values, bits, layout.n, layout.m, weight.shape)
    entries = [layout.n, layout.m, crc, *weight.shape]
    return values, bits, torch.tensor(entries)


def _pack_mask(words: Tensor) -> tuple[Tensor, Tensor]:
    keep = words != 0
    return words[keep], pack_bits(keep)


def _pack_groups(words: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Returns the n values of every group, zeros among them if it has fewer, and the codes of their positions."""
    words_GM = words.view(-1, m)
    order_GM = (words_GM != 0).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    positions_GN = order_GM[:, :n].sort(1).values
    codes = torch.zeros(2**m, dtype=torch.long)  # by the set of positions, as the bits of a number
    sets = combinations(n, m)
    codes[(1 << sets).sum(1)] = torch.arange(len(sets))
    codes_G = codes[(1 << positions_GN).sum(1)]
    bits = codes_G[:, None] >> torch.arange(code_width(n, m)) & 1
    return words_GM.gather(1, positions_GN).flatten(), pack_bits(bits.flatten().bool())


def pack_bits(entries: Tensor) -> Tensor:
    """Returns bools as the bits of uint8, the first in the lowest bit: [1, 0, 1] is 5. The last byte is padded by 0."""
    padded = torch.nn.functional.pad(entries.to(torch.uint8), (0, -len(entries) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def pack_folder(folder: Path) -> None:
    """Packs every weight of an ordinary Hugging Face folder that becomes smaller, in place, shard by shard.

    Adds the entries of the config by which transformers finds the quantiser or says what to install, and the program
    that unpacks the folder.
    """
    sizes = {file.name: _pack_file(file) for file in unpack.weight_files(folder)}
    if (folder / INDEX).exists():
        unpack.write_index(folder / INDEX, sizes)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    added = {QUANTIZATION: {"quant_method": METHOD, "version": VERSION}, FILE_FIELD: NO_FILE}
    unpack.write_json(folder / CONFIG, config | added)
    shutil.copyfile(unpack.__file__, folder / "unpack.py")


def _pack_file(file: Path) -> dict[str, int]:
    """Packs the weights in one file; returns the bytes of its tensors by name."""
    tensors: dict[str, Tensor] = {}
    checksums: dict[str, int] = {}  # of the tensors that stay as they are
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (no mapping)
            tensor = stored.get_tensor(name)
            layout = layout_of(tensor)
            if layout is None:
                tensors[name], checksums[name] = tensor, plain_checksum(tensor)
            else:
                tensors |= {
                    name + end: part for end, part in zip(("", BITS, LAYOUT), pack(tensor, layout), strict=True)
                }
        with atomic_write(file) as draft:
            save_file(tensors, draft, {"format": "pt", CHECKSUMS: json.dumps(checksums)})
    return {name: tensor.nbytes for name, tensor in tensors.items()}
