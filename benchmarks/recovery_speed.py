"""Training speed of MaskedLoRA relative to LoRA through peft, measured alternately in one process.

    python benchmarks/recovery_speed.py --pretrained FOLDER --seq_length 1024 --batch_size 1

A step is the forward and backward pass of one batch; the optimizer takes the same short time for both. MaskedLoRA
needs three matrix products per linear where plain LoRA needs two, so that its speed should be at least 2/3.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from jsonargparse import auto_cli

from lit_prune.allocate import Uniform
from lit_prune.models.load import load_model
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, MaskedLoRA


def main(
    pretrained: str = "embedded",
    seq_length: int = 256,
    batch_size: int = 8,
    r: int = 8,
    turns: int = 7,
    checkpointing: bool = False,
) -> None:
    """Prints the tokens per second of both, and the median, smallest and largest ratio.

    Args:
        pretrained: Hub id, folder, .gguf file or `embedded`; half of its weights are pruned.
        seq_length: Tokens per window; the tokens themselves are arbitrary.
        batch_size: Windows per step.
        r: Rank of the adapters.
        turns: Number of measured steps of each, after one warm-up step.
        checkpointing: Recompute activations in the backward pass.
    """
    models = []
    for recovery in (LoRA(r=r), MaskedLoRA(r=r)):
        model = load_model(pretrained, "float32").train()
        ids_BT = torch.arange(batch_size * seq_length).view(batch_size, seq_length) % model.config.vocab_size
        prune(model, [ids_BT[:1]], Recipe(Magnitude(), 0.5, Uniform()))
        recovery.attach(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        models.append(model)

    def tokens_per_second(model: torch.nn.Module) -> float:
        begin = time.perf_counter()
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        model.zero_grad()
        return ids_BT.numel() / (time.perf_counter() - begin)

    speeds = [[tokens_per_second(model) for model in models] for _ in range(turns + 1)][1:]
    ratios = [masked / plain for plain, masked in speeds]
    plain, masked = (median(turn[model] for turn in speeds) for model in (0, 1))
    print(
        f"LoRA {plain:.0f}, MaskedLoRA {masked:.0f} tokens per second; ratio {median(ratios):.2f} ({min(ratios):.2f} "
        f"to {max(ratios):.2f}) over {turns} turns of {batch_size} x {seq_length} tokens, r = {r}"
    )


if __name__ == "__main__":
    auto_cli(main)
