"""Headers of safetensors, and models whose weights cannot be views of the mapped files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from lit_prune.errors import InputError
from lit_prune.models.files.mappable import Header, check_mappable, headers
from lit_prune.models.load import load_model
from tests.models.test_on_disk import STACKED, stored


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_headers_of_one_file_or_of_several(shard: str, tmp_path: Path) -> None:
    folder = stored(tmp_path, shard=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shard != "1GB")
    found = headers(folder)
    assert found["model.embed_tokens.weight"] == Header((64, 32), torch.bfloat16)
    assert found["model.layers.2.mlp.up_proj.weight"] == Header((48, 32), torch.bfloat16)
    assert found["model.norm.weight"] == Header((32,), torch.bfloat16)
    assert len(found) == 1 + 3 * 9 + 1  # the head is tied


def test_a_type_that_needs_no_conversion_is_accepted(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    check_mappable(folder, config, torch.bfloat16)
    check_mappable(folder, config, None)
    with pytest.raises(InputError, match=r"`model.dtype` must be bfloat16 .* got float32: converting it takes memory"):
        check_mappable(folder, config, torch.float32)


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    config = AutoConfig.from_pretrained(folder, intermediate_size=40)
    with pytest.raises(InputError, match=r"must be false for .*no model.layers.0.mlp.gate_proj.weight"):
        check_mappable(folder, config, None)


@pytest.mark.parametrize("family", sorted(STACKED))
def test_what_is_converted_as_it_loads_is_refused(family: str, tmp_path: Path) -> None:
    folder = stored(tmp_path, family)
    with pytest.raises(
        InputError, match=r"`model.on_disk` must be false for .*experts.*transformers converts other tensors"
    ):
        load_model(folder, on_disk=True)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no safetensors: load it in memory once"):
        load_model(folder, on_disk=True)
