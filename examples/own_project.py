"""An ordinary project with a LightningModule, a data module and a LightningCLI, and pruning as two more callbacks.

    python examples/own_project.py fit --config examples/own_project.yaml

This file uses lit_prune only for the model, the text and the perplexity; pruning is configured in the YAML.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune.data.python_docs import python_docs
from lit_prune.evaluation.perplexity import Perplexity
from lit_prune.models.load import EMBEDDED

Batch = dict[str, Tensor]


class MyModule(LightningModule):
    """A Hugging Face causal LM, stored as ``self.model``, where the callback finds it."""

    def __init__(self, name: str = str(EMBEDDED), lr: float = 1e-3) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).train()
        self.lr, self.perplexity = lr, Perplexity()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        loss = self.model(**batch, labels=batch["input_ids"]).loss
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to `val/perplexity`."""
        self.perplexity.update(self.model(**batch).logits, batch["input_ids"])
        self.log("val/perplexity", self.perplexity, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns AdamW over the trainable parameters, which after a cut are those of the adapter."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class MyData(LightningDataModule):
    """Windows of documentation as dicts with `input_ids`; the tokenizer is exported with the model."""

    def __init__(self, name: str = str(EMBEDDED), tokens: int = 256, batch_size: int = 8, windows: int = 512) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.tokens, self.batch_size, self.windows = tokens, batch_size, windows

    def train_dataloader(self) -> DataLoader:
        """Returns shuffled windows."""
        return DataLoader(self._windows("train", self.windows), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Returns windows of other documents."""
        return DataLoader(self._windows("validation", self.windows // 8), self.batch_size)

    def _windows(self, part: str, count: int) -> list[Batch]:
        text = "\n".join(row["text"] for row in python_docs(part))  # type: ignore[arg-type]
        ids = self.tokenizer(text[: count * self.tokens * 8], return_tensors="pt", verbose=False)["input_ids"][0]
        return [{"input_ids": window} for window in ids.split(self.tokens) if len(window) == self.tokens][:count]


if __name__ == "__main__":
    LightningCLI(MyModule, MyData, save_config_callback=None, seed_everything_default=0)
