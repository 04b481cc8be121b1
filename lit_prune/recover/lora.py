"""LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685, through peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import InputError
from lit_prune.linears import has_fused_experts
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
        target_modules: Name suffixes of the linears that get an adapter; null takes all but the head, and of a mixture
            of fused experts those of the attention: the experts stay as they were pruned.

    Raises:
        InputError: for a rank below 1, a dropout outside [0, 1), or target modules that match nothing
            that can have an adapter.
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
        targets: str | list[str] | None = self.target_modules
        if targets is None:
            targets = sorted(_last_names(_adaptable(model))) if has_fused_experts(model) else "all-linear"
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        )
        add_adapter(model, config)

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError for target modules that match no linear, or only such as can have no adapter."""
        linears = _adaptable(model)
        for target in self.target_modules or []:
            if not any(name == target or name.endswith(f".{target}") for name in linears):
                fused = (
                    "; fused experts, and linears of their names, get no adapter" if has_fused_experts(model) else ""
                )
                raise InputError(
                    f"`LoRA.target_modules` must match linears of the model, got {target!r}; there are "
                    f"{', '.join(sorted(_last_names(linears)))}{fused}."
                )


def _adaptable(model: PreTrainedModel) -> list[str]:
    """The modules that an adapter can be put on.

    peft takes a mixture's gate_proj, up_proj and down_proj for the fused experts, also where a block has an MLP of its
    own, and on those its adapter would make a whole matrix of B A for every expert in each step.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    if not has_fused_experts(model):
        return linears
    return [name for name in linears if not name.endswith(("gate_proj", "up_proj", "down_proj", "lm_head"))]


def _last_names(names: list[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}
