"""Unpacks a folder of pruned weights that lit_prune packed. This file needs torch and safetensors alone:

    python unpack.py FOLDER OUTPUT

writes the ordinary Hugging Face folder, every tensor as it was before it was packed, bit for bit. lit_prune copies this
file into every folder that it packs, and uses it itself.

Layout, version 1. Instead of a weight called NAME the safetensors hold three tensors:

    NAME         the stored values in row-major order: one dimension, in the data type of the weight
    NAME_bits    uint8: where they stand
    NAME_layout  int64: [n, m, CRC-32, *shape of the weight]

The bits of a byte are counted from the lowest. All other weights are zero. If n = m = 0, NAME_bits is a mask: its bit i
is 1 if weight i, in row-major order, is stored. Otherwise every m consecutive weights of a row have n stored ones, and
NAME_bits has b = ceil(log2(C(m, n))) bits for each of these groups, the lowest first: the rank of its n positions among
``itertools.combinations(range(m), n)``. Bits behind the last are 0. The CRC-32 is that of the bytes of NAME, those of
NAME_bits and a text like "bfloat16 0 0 2048 8192": data type, n, m and shape. The CRC-32 of each tensor that is not
packed is in the metadata of the safetensors, whose entry "checksums" is a JSON object with the names as keys.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import numpy as np  # ten times as fast as torch at finding the ones in a mask
except ImportError:
    np = None  # type: ignore[assignment]

VERSION = 1
INSTALL = "pip install lit-prune, then import lit_prune"
# transformers without lit_prune quotes the first in a warning and the second in the error that ends the loading: it
# refuses the name of a file of weights that is none. With lit_prune the quantiser removes that name.
METHOD = f"lit_prune ({INSTALL})"
NO_FILE, FILE_FIELD = f"none, these weights are packed by lit_prune ({INSTALL})", "transformers_weights"
BITS, LAYOUT, CHECKSUMS = "_bits", "_layout", "checksums"
CONFIG, QUANTIZATION = "config.json", "quantization_config"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
CARD = "README.md"
UNPACKED = (
    "**Unpacked**: this folder is an ordinary one, which stores the zeros and opens as any other. What the text above "
    "says of packed weights and their size is about the folder that it was unpacked from."
)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes; as floats, -0.0 would be 0.0
CHUNK = 2**16  # weights that are unpacked at a time; divisible by 64, so that a chunk of groups begins with a byte
# for each byte, its eight bits as one int64 (eight bools), so that unpacking a byte is one look-up
BYTES = (torch.arange(256)[:, None] >> torch.arange(8) & 1).to(torch.uint8).view(torch.int64).flatten()


class Damaged(ValueError):
    """Raised for a packed tensor that is not what was written; the message names the tensor."""


def unpack(values: Tensor, bits: Tensor, layout: Tensor) -> Tensor:
    """Returns the weight that three stored tensors describe; they must have passed :func:`check`.

    Beside the result it takes less than a megabyte of memory.
    """
    n, m, _, *shape = layout.tolist()
    integers = INTEGERS[values.itemsize]
    flat, words = torch.zeros(math.prod(shape), dtype=integers, device=values.device), values.view(integers)
    start = 0
    for begin in range(0, flat.numel(), CHUNK):
        part = flat[begin : begin + CHUNK]
        keep = _group_mask(bits, begin, part.numel(), n, m) if m else _mask(bits, begin, part.numel())
        positions = _ones(keep)
        part.scatter_(0, positions, words[start : start + positions.numel()])
        start += positions.numel()
    return flat.view(values.dtype).view(shape)


def _mask(bits: Tensor, begin: int, count: int) -> Tensor:
    """Returns which of ``count`` weights from ``begin`` on are stored, by their bits."""
    part = bits[begin // 8 : (begin + count + 7) // 8]
    if part.is_cpu and np:
        return torch.from_numpy(np.unpackbits(part.numpy(), count=count, bitorder="little")).view(torch.bool)
    return BYTES.to(bits.device)[part.int()].view(torch.bool)[:count]


def _group_mask(bits: Tensor, begin: int, count: int, n: int, m: int) -> Tensor:
    """Returns which of ``count`` weights from ``begin`` on are stored, by the codes of their groups."""
    return _masks_by_code(n, m).to(bits.device)[_codes(bits, begin // m, count // m, n, m)].view(torch.bool)


@cache
def _masks_by_code(n: int, m: int) -> Tensor:
    """Returns the mask of every code as one integer of m bytes, so that a group is one look-up."""
    sets = combinations(n, m)
    masks = torch.zeros(len(sets), m, dtype=torch.bool).scatter_(1, sets, True)
    return masks.view(INTEGERS[m]).flatten()


def _ones(keep: Tensor) -> Tensor:
    """Returns the positions of the entries that are True."""
    return torch.from_numpy(np.flatnonzero(keep.numpy())) if keep.is_cpu and np else keep.nonzero().flatten()


def _codes(bits: Tensor, first: int, count: int, n: int, m: int) -> Tensor:
    """Returns the codes of ``count`` groups from the group ``first`` on, which is divisible by 8; int32 or int64."""
    width = code_width(n, m)
    stored = bits[first * width // 8 : ((first + count) * width + 7) // 8]
    if bits.is_cpu and np:
        columns = np.unpackbits(stored.numpy(), count=count * width, bitorder="little").reshape(count, width)
        codes = columns[:, 0].copy()
        for place in range(1, width):
            codes |= columns[:, place] << place
        return torch.from_numpy(codes).int()
    padded = torch.nn.functional.pad(stored, (0, -len(stored) % width)).view(-1, width).long()
    words = (padded << 8 * torch.arange(width, device=bits.device)).sum(1)  # of eight codes, in at most 56 bits
    return (words[:, None] >> width * torch.arange(8, device=bits.device) & 2**width - 1).flatten()[:count]


def combinations(n: int, m: int) -> Tensor:
    """Returns the sets of n of m positions in lexicographic order, shape (sets, n): row 1 of 2 of 4 is [0, 2]."""
    return torch.tensor(list(itertools.combinations(range(m), n)))


def code_width(n: int, m: int) -> int:
    """Returns the bits of the code of a group: 3 for 2 of 4, which has six codes."""
    return (math.comb(m, n) - 1).bit_length()


def count_bits(size: int, n: int, m: int) -> int:
    """Returns the number of bits that ``size`` weights need beside their values."""
    return size // m * code_width(n, m) if m else size


def checksum(values: Tensor, bits: Tensor, n: int, m: int, shape: Sequence[int]) -> int:
    """Returns the CRC-32 of a packed weight: its stored values, its bits, its data type and its layout."""
    described = " ".join(map(str, (str(values.dtype).removeprefix("torch."), n, m, *shape)))
    return zlib.crc32(described.encode(), zlib.crc32(_buffer(bits), zlib.crc32(_buffer(values))))


def plain_checksum(tensor: Tensor) -> int:
    """Returns the CRC-32 of a tensor that is not packed."""
    return zlib.crc32(_buffer(tensor))


def _buffer(tensor: Tensor) -> Any:
    """Returns the memory of a contiguous tensor on the CPU as a buffer."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.numel() else b""


def check(name: str, values: Tensor, bits: Tensor, layout: Tensor) -> None:
    """Raises Damaged unless the three tensors of the weight ``name`` fit together and have their checksum."""
    entries = layout.tolist() if layout.dtype == torch.int64 and layout.ndim == 1 else []
    n, m, crc, *shape = entries if len(entries) > 4 else (0, -1, 0)
    is_mask, is_groups = n == m == 0, 0 < n < m <= 8 and bool(shape) and shape[-1] % m == 0
    if not (is_mask or is_groups) or min(shape) < 1 or values.itemsize not in INTEGERS:
        raise Damaged(f"{name}{LAYOUT} is damaged: {entries} describes no weight.")
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != ((count_bits(size, n, m) + 7) // 8,):
        raise Damaged(f"{name}{BITS} is damaged: it does not have the size that weights of shape {shape} need.")
    expected = int.from_bytes(_buffer(bits), "little").bit_count() if is_mask else size // m * n
    if values.shape != (expected,):
        raise Damaged(f"{name} is damaged: {expected} values are marked as stored, and {values.numel()} are there.")
    if checksum(values, bits, n, m, shape) != crc:
        raise Damaged(f"{name} is damaged: its values or bits are not those that were written.")


def packed_names(stored: Mapping[str, Any] | set[str]) -> list[str]:
    """Returns the names of the packed weights among the names of stored tensors.

    Raises:
        Damaged: if one of the three tensors of a weight is missing.
    """
    names = sorted({name.removesuffix(end) for end in (BITS, LAYOUT) for name in stored if name.endswith(end)})
    for name in names:
        for needed in (name, name + BITS, name + LAYOUT):
            if needed not in stored:
                raise Damaged(f"{needed} is missing, without which {name} cannot be unpacked.")
    return names


def check_version(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless ``config``, a quantization_config, is that of a packed folder of this version."""
    if config.get("version") != VERSION:
        raise ValueError(
            f"the packed weights have version {config.get('version')} of the layout, and this program reads version "
            f"{VERSION}: update lit_prune, or use the unpack.py in the folder."
        )


def check_file(file: Path) -> list[str]:
    """Returns the names of the packed weights in a file of weights, after checking all of its tensors.

    Raises:
        Damaged: for a tensor that is not or would not be unpacked to what was written, and for a file that was cut off.
    """
    with _opened(file) as stored:
        names = packed_names(set(stored.keys()))
        for name in names:
            check(name, *(stored.get_tensor(name + end) for end in ("", BITS, LAYOUT)))
        for name, crc in json.loads((stored.metadata() or {}).get(CHECKSUMS, "{}")).items():
            if name not in stored.keys():  # noqa: SIM118 (no mapping)
                raise Damaged(f"{name} is missing in {file.name}.")
            if plain_checksum(stored.get_tensor(name)) != crc:
                raise Damaged(f"{name} is damaged: its values are not those that were written.")
    return names


def _check_shards(folder: Path) -> None:
    """Raises Damaged, with the first of its tensors, if a file is missing that the index names."""
    index = folder / INDEX
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.exists() else {}
    for name, shard in shards.items():
        if not (folder / shard).exists():
            raise Damaged(f"{name} is missing: {folder} has no {shard}.")


def _opened(file: Path) -> Any:
    """Returns an opened file of weights; raises Damaged, with the first tensor that is cut off, if it is too short."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        damaged = _first_cut_off(file) or "the header"
        raise Damaged(f"{damaged} in {file.name} is damaged: {error}.") from error


def _first_cut_off(file: Path) -> str | None:
    """Returns the name of the first tensor that reaches beyond the end of ``file``; None without a readable header."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(length, 100 * 2**20)))  # the most that safetensors allows
        except ValueError:
            return None
    end = file.stat().st_size - 8 - length
    cut = [(entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__"]
    return next((name for (_, last), name in sorted(cut) if last > end), None)


def unpacked_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a file of weights by name, packed ones unpacked; check it first by :func:`check_file`."""
    with _opened(file) as stored:
        names = set(packed_names(set(stored.keys())))
        for name in stored.keys():  # noqa: SIM118 (no mapping)
            if name in names:
                yield name, unpack(*(stored.get_tensor(name + end) for end in ("", BITS, LAYOUT)))
            elif not any(name == packed + end for packed in names for end in (BITS, LAYOUT)):
                yield name, stored.get_tensor(name)


def unpack_folder(folder: Path, output: Path) -> None:
    """Writes the ordinary folder of the packed ``folder`` to ``output``, which is created.

    Raises:
        ValueError: for a folder that is not packed, or is damaged; nothing is written then.
    """
    config = _read_config(folder / CONFIG)
    if (config.get(QUANTIZATION) or {}).get("quant_method") != METHOD:
        raise ValueError(f"{folder} is not packed by lit_prune: its config.json does not say so.")
    check_version(config.pop(QUANTIZATION))
    config.pop(FILE_FIELD, None)
    _check_shards(folder)
    files = weight_files(folder)
    for file in files:
        check_file(file)
    shutil.copytree(folder, output, ignore=lambda _, names: [name for name in names if _is_packed(name)])
    sizes: dict[str, dict[str, int]] = {}  # by file and tensor
    for file in files:
        tensors = dict(unpacked_tensors(file))
        save_file(tensors, output / file.name, {"format": "pt"})
        sizes[file.name] = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_json(output / CONFIG, config)
    if (card := output / CARD).exists():
        card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{UNPACKED}\n", encoding="utf-8")
    if (output / INDEX).exists():
        write_index(output / INDEX, sizes)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    return config


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors of the model in ``folder``, without those of an adapter."""
    return sorted(file for file in folder.glob("*.safetensors") if file.name != ADAPTER)


def _is_packed(name: str) -> bool:
    """Returns whether a file of a packed folder is one that an ordinary folder does not have, or has otherwise."""
    return name == Path(__file__).name or (name.endswith(".safetensors") and name != ADAPTER)


def write_json(file: Path, content: Any) -> None:
    """Writes ``content`` as transformers writes its configs."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_index(file: Path, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Updates an index of shards to the bytes of their tensors, by file and name."""
    index = json.loads(file.read_text(encoding="utf-8"))
    index["metadata"]["total_size"] = sum(size for tensors in sizes.values() for size in tensors.values())
    index["weight_map"] = {name: shard for shard, tensors in sizes.items() for name in tensors}
    write_json(file, index)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python unpack.py FOLDER OUTPUT")
    try:
        unpack_folder(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
