"""LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685, through peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from lit_prune.errors import InputError
from lit_prune.recover.base import Recovery, add_adapter


@final
@dataclass(frozen=True)
class LoRA(Recovery):
    """Freezes the pruned weights and trains W + alpha / r * B A beside them.

    The adapter is exported beside the pruned weights, not merged: B A is dense, and adding it would fill every zero.

    Args:
        r: Rank.
        alpha: Numerator of the scale alpha / r.
        dropout: Dropout on the adapter's input, in [0, 1).
        target_modules: Name suffixes of the linears that get an adapter; null takes all but the head.

    Raises:
        InputError: for a rank below 1, a dropout outside [0, 1), or target modules that match nothing.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"`LoRA.r` must be at least 1, got {self.r}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"`LoRA.dropout` must be in [0, 1), got {self.dropout}.")

    def attach(self, model: PreTrainedModel) -> None:
        """Adds an adapter to ``model`` and freezes everything else."""
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules or "all-linear",
            task_type="CAUSAL_LM",
        )
        add_adapter(model, config)

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError for target modules that match no linear."""
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        for target in self.target_modules or []:
            if not any(name == target or name.endswith(f".{target}") for name in linears):
                known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
                raise InputError(
                    f"`LoRA.target_modules` must match linears of the model, got {target!r}; there are {known}."
                )
