"""`lit-prune unpack` writes a folder or says in a line why not."""

import json
from pathlib import Path

import pytest
import torch

from lit_prune.cli.main import main
from lit_prune.packed.pack import pack_folder
from lit_prune.packed.unpack import CONFIG
from tests.conftest import small_model


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = small_model()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[torch.rand(48, 32) < 0.7] = 0
    model.save_pretrained("packed")
    pack_folder(Path("packed"))
    return Path("packed")


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["unpack", *args])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def test_a_folder_is_unpacked_once(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["unpack", str(packed), "--output", "new/out"])
    assert capsys.readouterr().out == "new/out\n"
    assert sorted(path.name for path in Path("new").iterdir()) == ["out"]
    assert Path("new/out/model.safetensors").stat().st_size > (packed / "model.safetensors").stat().st_size
    message = refused(capsys, str(packed), "--output=new/out")
    assert "`output` must be a new folder, got new/out, which exists: choose another." in message


def test_what_cannot_be_unpacked(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "`folder` must be a packed Hugging Face folder, got none: it has" in refused(capsys, "none", "--output=out")
    assert "arguments are required: --output (see lit-prune unpack --help)" in refused(capsys, str(packed))
    file = packed / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    assert "`folder` cannot be unpacked: model." in (message := refused(capsys, str(packed), "--output=out"))
    assert "is damaged" in message
    file.write_bytes(content)
    (packed / CONFIG).write_text(json.dumps({"model_type": "llama"}))
    assert "packed is not packed by lit_prune: its config.json" in refused(capsys, str(packed), "--output=out")
    assert not Path("out").exists()
