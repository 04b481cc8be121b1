"""Perplexity of the embedded model, dense and pruned.

    python benchmarks/embedded.py

Prints the perplexity on the validation text, that of a unigram model on the same tokens (frequencies of the training
text, with one added to each count), and the perplexity after DLP + Wanda at several sparsities.
"""

from __future__ import annotations

import torch
from jsonargparse import auto_cli

from lit_prune.calibration.windows import batches_of
from lit_prune.data.datamodule import TextDataModule
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.load import load_model
from lit_prune.pipeline import prune
from lit_prune.recipe import Recipe


def unigram_perplexity(train: torch.Tensor, val: torch.Tensor, words: int) -> float:
    """Returns exp(mean -log p(token)) of ``val`` under the frequencies of ``train``, with one added to each count."""
    counts = torch.bincount(train.long(), minlength=words).double() + 1
    return float(torch.exp(-(counts / counts.sum()).log()[val.long()].mean()))


def main(seq_length: int = 256, num_samples: int = 64) -> None:
    """Prints the perplexities.

    Args:
        seq_length: Tokens per window.
        num_samples: Calibration windows.
    """
    data = TextDataModule(seq_length=seq_length)
    model = load_model("embedded", "float32")
    unigram = unigram_perplexity(data.stream("train"), data.stream("val"), model.config.vocab_size)
    dense = measure(model, data.val_dataloader(), data.describe("val"))
    print(f"{dense.protocol}\nunigram {unigram:.1f}\ndense {dense.perplexity:.2f}")
    batches = batches_of(data.calibration_windows(num_samples, seq_length, seed=0), 8)
    for sparsity in (0.3, 0.5, 0.6, 0.7):
        model = load_model("embedded", "float32")
        prune(model, batches, Recipe(sparsity=sparsity))
        print(f"sparsity {sparsity}: {measure(model, data.val_dataloader(), '').perplexity:.2f}")


if __name__ == "__main__":
    auto_cli(main)
