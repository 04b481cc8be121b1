"""Every YAML that ships, run for two steps on the embedded model."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lit_prune.cli.main import main
from tests.conftest import small_model

FOLDER = Path(__file__).parent.parent / "configs"
FOREIGN = FOLDER / "foreign_cli.yaml"
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - {FOREIGN})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = config.read_text()
    assert text.startswith("# ")
    assert f"lit-prune fit --config configs/{config.name}" in text.split("\n", 2)[1]
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("Return the number of items in a container, or raise an error.\n" * 400)
    Path("val.txt").write_text("Open the file, read its lines and close it again when that is done.\n" * 200)
    kind = "jsonl" if "instructions" in yaml.safe_load(text)["data"] else "txt"
    for part in ("train", "val"):
        rows = [{"prompt": f"What is {part} {number}?", "completion": "A number."} for number in range(99)]
        Path(f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    warnings.simplefilter("ignore")
    at_step = yaml.safe_load(text).get("pruning", {}).get("at_step", 0)
    steps = list(range(len(at_step))) if isinstance(at_step, list) else min(at_step, 1)
    main(
        [
            "fit",
            f"--config={config}",
            "--output=out",
            "--model.pretrained=embedded",
            f"--data.train_files=train.{kind}",
            f"--data.val_files=val.{kind}",
            "--data.seq_length=64",
            "--data.val_seq_length=64",
            "--pruning.calibration.num_samples=4",
            "--pruning.calibration.seq_length=64",
            f"--pruning.at_step={steps}",
            f"--trainer.max_steps={max(2, len(steps) if isinstance(steps, list) else 0)}",
            "--trainer.val_check_interval=2",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert Path("out/report.json").is_file()
    assert Path("out/model/model.safetensors").is_file()


class Foreign(LightningModule):
    """Somebody's own module."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.model = small_model(vocab_size=4096)
        self.lr = lr

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch, labels=batch["input_ids"]).loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Text(LightningDataModule):
    """Somebody's own data."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader([{"input_ids": row} for row in torch.randint(1, 64, (64, 16))], batch_size=4)

    val_dataloader = train_dataloader


def test_the_callbacks_in_a_cli_of_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"--config configs/{FOREIGN.name}" in FOREIGN.read_text().split("\n", 2)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["your_cli.py"])
    warnings.simplefilter("ignore")
    steps = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    LightningCLI(Foreign, Text, save_config_callback=None, args=["fit", f"--config={FOREIGN}", *steps])
    report = json.loads(Path("runs/foreign/report.json").read_text())
    assert report["sparsity"]["achieved_linears"] == pytest.approx(0.5, abs=1e-3)
    assert report["perplexity"]["recovered"] == pytest.approx(report["export"]["perplexity"], rel=1e-3)
    assert report["protocol"]["data"] == "validation dataloader"
