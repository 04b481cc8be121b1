"""The layout by hand, what is damaged, and the program that a folder carries."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_prune.packed import unpack as unpacking
from lit_prune.packed.pack import layout_of, pack, pack_folder
from lit_prune.packed.unpack import (
    CARD,
    CONFIG,
    INDEX,
    METHOD,
    QUANTIZATION,
    UNPACKED,
    Damaged,
    check,
    check_file,
    check_version,
    checksum,
    code_width,
    combinations,
    unpack,
    unpack_folder,
)
from tests.conftest import small_model

# rows [0, 3, 0, 0] and [5, 0, 0, 7]: the ones are the bits 1, 4 and 7, 2 + 16 + 128
VALUES, MASK = torch.tensor([3.0, 5.0, 7.0]), torch.tensor([146], dtype=torch.uint8)
DENSE = torch.tensor([[0.0, 3.0, 0.0, 0.0], [5.0, 0.0, 0.0, 7.0]])
# two of four: [0, 3, 9, 0] has the positions (1, 2), code 3; [5, 0, 0, 7] has (0, 3), code 2; 3 + 2 * 8 = 19
PAIRS, CODES = torch.tensor([3.0, 9.0, 5.0, 7.0]), torch.tensor([19], dtype=torch.uint8)


def layout(n: int, m: int, values: Tensor, bits: Tensor, *shape: int) -> Tensor:
    return torch.tensor([n, m, checksum(values, bits, n, m, shape), *shape])


def test_a_mask_by_hand() -> None:
    assert unpack(VALUES, MASK, layout(0, 0, VALUES, MASK, 2, 4)).tolist() == DENSE.tolist()


def test_groups_by_hand() -> None:
    weight = unpack(PAIRS, CODES, layout(2, 4, PAIRS, CODES, 2, 4))
    assert weight.tolist() == [[0, 3, 9, 0], [5, 0, 0, 7]]
    assert combinations(2, 4).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert [code_width(*group) for group in [(2, 4), (1, 4), (4, 8), (1, 8)]] == [3, 2, 7, 3]


def test_without_numpy_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 30).masked_fill(torch.rand(64, 30) < 0.5, 0)
    found = layout_of(weight)
    assert found is not None
    packed = pack(weight, found)
    monkeypatch.setattr(unpacking, "np", None)
    assert torch.equal(unpack(*packed), weight)


@pytest.mark.parametrize(
    ("values", "bits", "entries", "message"),
    [
        (VALUES[:2], MASK, [0, 0, None, 2, 4], r"w is damaged: 3 values are marked as stored, and 2 are there\."),
        (VALUES, MASK ^ 1, [0, 0, None, 2, 4], r"w is damaged: 4 values are marked as stored, and 3 are there\."),
        (VALUES, MASK, [0, 0, None, 3, 4], r"w_bits is damaged: .* that weights of shape \[3, 4\] need\."),
        (VALUES, MASK.int(), [0, 0, None, 2, 4], r"w_bits is damaged"),
        (VALUES, MASK, [0, 0, 1, 2, 4], r"w is damaged: its values or bits are not those that were written\."),
        (PAIRS, CODES, [2, 3, None, 2, 4], r"w_layout is damaged: .* describes no weight\."),
        (PAIRS, CODES, [5, 4, None, 2, 4], r"w_layout is damaged"),
        (VALUES, MASK, [0, 0, None], r"w_layout is damaged"),
        (VALUES, MASK, [0, 0, None, 2, -4], r"w_layout is damaged"),
        (PAIRS[:3], CODES, [2, 4, None, 2, 4], r"w is damaged: 4 values are marked as stored, and 3 are there\."),
    ],
)
def test_a_weight_that_is_damaged(values: Tensor, bits: Tensor, entries: list[int | None], message: str) -> None:
    n, m, _, *shape = entries
    crc = checksum(values, bits, n, m, shape)  # type: ignore[arg-type]
    with pytest.raises(Damaged, match=message):
        check("w", values, bits, torch.tensor([crc if entry is None else entry for entry in entries]))


def test_a_shape_or_type_that_was_altered() -> None:
    crc = checksum(VALUES, MASK, 0, 0, (2, 4))
    assert crc == zlib.crc32(VALUES.numpy().tobytes() + bytes([146]) + b"float32 0 0 2 4")
    check("w", VALUES, MASK, torch.tensor([0, 0, crc, 2, 4]))
    altered = [(VALUES, [0, 0, crc, 4, 2]), (VALUES.view(torch.int32), [0, 0, crc, 2, 4])]
    for values, entries in altered:
        with pytest.raises(Damaged, match=r"w is damaged: its values or bits are not those that were written\."):
            check("w", values, MASK, torch.tensor(entries))


def test_an_unknown_version() -> None:
    check_version({"version": 1})
    with pytest.raises(ValueError, match=r"have version 2 of the layout, and this program reads version 1: update"):
        check_version({"version": 2})


def folders(path: Path, **fields: object) -> tuple[Path, Path]:
    """An ordinary folder of a pruned model, and the same packed."""
    model = small_model(tie_word_embeddings=False, **fields).to(torch.bfloat16)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data[torch.rand(parameter.shape) < 0.5] = 0
    for folder in (path / "ordinary", path / "packed"):
        model.save_pretrained(folder, max_shard_size=20_000)
    pack_folder(path / "packed")
    return path / "ordinary", path / "packed"


def test_a_file_that_was_cut_off_names_its_first_tensor(tmp_path: Path) -> None:
    _, packed = folders(tmp_path)
    file = min(packed.glob("model-*.safetensors"))
    names = check_file(file)
    assert names
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = {name: entry for name, entry in json.loads(content[8 : 8 + length]).items() if name != "__metadata__"}
    last = max(header, key=lambda name: header[name]["data_offsets"])
    file.write_bytes(content[:-1])
    with pytest.raises(Damaged, match=rf"{last} in {file.name} is damaged"):
        check_file(file)
    file.write_bytes(content[:4])
    with pytest.raises(Damaged, match=rf"the header in {file.name} is damaged"):
        check_file(file)


def test_a_tensor_that_is_not_packed_is_checked_too(tmp_path: Path) -> None:
    _, packed = folders(tmp_path)
    files = sorted(packed.glob("model-*.safetensors"))
    file = next(file for file in files if "model.norm.weight" in load_file(file))
    with safe_open(file, framework="pt") as stored:
        tensors, metadata = load_file(file), stored.metadata()
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, file, metadata)
    with pytest.raises(Damaged, match=r"model\.norm\.weight is damaged: its values are not those that were written"):
        check_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, file, metadata)
    with pytest.raises(Damaged, match=rf"model\.norm\.weight is missing in {file.name}\."):
        check_file(file)
    file.unlink()
    with pytest.raises(Damaged, match=rf"is missing: .*packed has no {file.name}\."):
        unpack_folder(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["", "_bits", "_layout"])
def test_a_part_of_a_weight_that_is_missing(end: str, tmp_path: Path) -> None:
    parts = {"": VALUES, "_bits": MASK, "_layout": layout(0, 0, VALUES, MASK, 2, 4)}
    save_file({f"w{name}": part for name, part in parts.items() if name != end}, tmp_path / "model.safetensors")
    with pytest.raises(Damaged, match=rf"w{end} is missing, without which w cannot be unpacked"):
        check_file(tmp_path / "model.safetensors")


def test_a_sharded_folder_is_unpacked_byte_by_byte(tmp_path: Path) -> None:
    ordinary, packed = folders(tmp_path)
    assert len(list(packed.glob("model-*.safetensors"))) > 2
    (packed / CARD).write_text("Packed.\n")
    unpack_folder(packed, tmp_path / "out")
    card = tmp_path / "out" / CARD
    assert card.read_text() == f"Packed.\n\n{UNPACKED}\n"
    card.unlink()
    files = sorted(path.name for path in ordinary.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    for name in files:
        if name != INDEX:
            assert (tmp_path / "out" / name).read_bytes() == (ordinary / name).read_bytes(), name
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (ordinary, tmp_path / "out"))
    assert after == before
    stored = json.loads((packed / INDEX).read_text())
    assert stored["weight_map"].keys() == {key for file in packed.glob("model-*") for key in load_file(file)}
    assert stored["metadata"]["total_size"] < 0.8 * before["metadata"]["total_size"]


def test_the_program_in_the_folder_needs_neither_lit_prune_nor_transformers(tmp_path: Path) -> None:
    ordinary, packed = folders(tmp_path)
    hidden = tmp_path / "hidden"
    for name in ("lit_prune", "transformers"):
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text("raise ImportError('hidden')\n")
    command = [sys.executable, str(packed / "unpack.py"), str(packed), str(tmp_path / "out")]
    done = subprocess.run(command, env={"PYTHONPATH": str(hidden)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for file in ordinary.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    again = subprocess.run([*command[:2], str(ordinary), str(tmp_path / "x")], capture_output=True, text=True)
    (packed / CONFIG).write_text("{")
    broken = subprocess.run([*command[:2], str(packed), str(tmp_path / "x")], capture_output=True, text=True)
    assert broken.stderr.startswith(f"{packed / CONFIG} is not valid JSON: Expecting property name")
    assert again.returncode == 1
    assert again.stderr == f"{ordinary} is not packed by lit_prune: its config.json does not say so.\n"


def test_a_damaged_or_newer_folder_writes_nothing(tmp_path: Path) -> None:
    _, packed = folders(tmp_path)
    file = max(packed.glob("model-*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-200] + bytes(200))
    with pytest.raises(Damaged, match="is damaged"):
        unpack_folder(packed, tmp_path / "out")
    file.write_bytes(content)
    config = json.loads((packed / CONFIG).read_text())
    assert config[QUANTIZATION] == {"quant_method": METHOD, "version": 1}
    (packed / CONFIG).write_text(json.dumps({**config, QUANTIZATION: {"quant_method": METHOD, "version": 9}}))
    with pytest.raises(ValueError, match="have version 9 of the layout"):
        unpack_folder(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
