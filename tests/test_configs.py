"""Every YAML that ships, run for two steps on the embedded model."""

import warnings
from pathlib import Path

import pytest

from lit_prune.cli import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = config.read_text()
    assert text.startswith("# ")
    assert f"lit-prune fit --config configs/{config.name}" in text.split("\n", 2)[1]
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("Return the number of items in a container, or raise an error.\n" * 400)
    Path("val.txt").write_text("Open the file, read its lines and close it again when that is done.\n" * 200)
    warnings.simplefilter("ignore")
    main(
        [
            "fit",
            f"--config={config}",
            "--output=out",
            "--model.pretrained=embedded",
            "--data.train_files=train.txt",
            "--data.val_files=val.txt",
            "--data.seq_length=64",
            "--data.val_seq_length=64",
            "--pruning.calibration.num_samples=4",
            "--pruning.calibration.seq_length=64",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=2",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert Path("out/report.json").is_file()
    assert Path("out/model/model.safetensors").is_file()
