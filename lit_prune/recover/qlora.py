"""QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023, arXiv 2305.14314, for a pruned model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

from transformers import PreTrainedModel

from lit_prune.errors import InputError, unknown_choice
from lit_prune.models import structure
from lit_prune.models.linears import has_fused_experts, linears_of
from lit_prune.models.quantised import MULTIPLES, Quantization
from lit_prune.recover.adapter import add_adapter, check_settings, check_targets, decoder_blocks, lora_config
from lit_prune.recover.base import ExportForm, Recovery
from lit_prune.recover.quantise import quantise

Form = Literal["adapter", "merged", "requantised"]


@final
@dataclass(frozen=True)
class QLoRA(Recovery):
    """Quantises the linears of the blocks after the cut, and trains an adapter over them.

    The form of the export also determines what is trained, so that validation runs what is exported:

    - `adapter`: Q + alpha / r * B A, exported as the quantised weights and, beside them, the adapter;
    - `merged`: (Q + alpha / r * B A) * M, M being the mask of the pruned weights, merged into plain weights of the
      model's original type, with every zero;
    - `requantised`: the same, quantised again after the merge, which rounds once more; the report has the perplexity
      after that.

    A sliced model has no masks: M is one everywhere.

    Args:
        r: Rank.
        alpha: Numerator of the scale alpha / r.
        dropout: Dropout on the adapter's input, in [0, 1); if the adapter is masked, the share of A's columns that a
            training step drops.
        target_modules: Name suffixes of the linears that get an adapter; null selects all but the head.
        quantization: Type of the weights: `nf4` and `fp4`, 4 bits with a scale for every 64 weights, or `int8` with a
            scale for every row.
        double_quant: Quantise the scales of 4-bit weights too, which saves 0.37 bits per weight.
        form: Form of the exported model.

    Raises:
        InputError: for a rank below 1, a dropout outside [0, 1), an unknown quantization or form, target modules that
            match nothing, fused experts, or linears whose size bitsandbytes does not support in 4 bits on every CPU.
    """

    quantises: ClassVar[bool] = True

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] | None = None
    quantization: Quantization = "nf4"
    double_quant: bool = True
    form: Form = "adapter"

    def __post_init__(self) -> None:
        check_settings(self)
        for field, choices in (("quantization", Quantization), ("form", Form)):
            if getattr(self, field) not in get_args(choices):
                raise unknown_choice(f"QLoRA.{field}", getattr(self, field), get_args(choices))

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError for target modules that match nothing, fused experts, and sizes unsupported in 4 bits."""
        blocks = decoder_blocks(model)
        if has_fused_experts(blocks.values()):
            raise InputError(
                "`pruning.recovery` must not be QLoRA for a mixture of fused experts, which bitsandbytes does not "
                "quantise, and which are most of its weights: use LoRA or MaskedLoRA."
            )
        check_targets(self, model)
        if self._writes_4_bits:
            head = model.get_output_embeddings()
            shapes = {
                f"{path}.{name}": tuple(linear.weight_OI.shape)
                for path, block in blocks.items()
                for name, linear in linears_of(block).items()
                if linear.module is not head
            }
            self._check_sizes(shapes)

    def check_sizes(self, method: str, multiple: int) -> None:
        """Raises InputError for an export in 4 bits of sizes unsupported in 4 bits."""
        if self._writes_4_bits and multiple % max(MULTIPLES):
            raise InputError(
                f"`QLoRA.form` must be merged after {method}, or `quantization` int8, got {self.form} in "
                f"{self.quantization}: bitsandbytes runs 4-bit linears on every CPU only where out and in are "
                f"multiples of {MULTIPLES[0]} and {MULTIPLES[1]}, and {method} leaves multiples of {multiple}; its "
                "`multiple` can be changed."
            )

    @property
    def _writes_4_bits(self) -> bool:
        return self.form != "merged" and self.quantization != "int8"

    def _check_sizes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if any(size % multiple for size, multiple in zip(shape, MULTIPLES, strict=True)):
                raise InputError(
                    f"`QLoRA.quantization` must be int8 for this model, or `QLoRA.form` merged, got "
                    f"{self.quantization}: {name} has a weight of {shape}, and bitsandbytes runs 4-bit linears on "
                    f"every CPU only where out and in are multiples of {MULTIPLES[0]} and {MULTIPLES[1]}."
                )

    def export_form(self, masked: bool) -> ExportForm:
        """Returns the form that was asked for."""
        return self.form

    def attach(self, model: PreTrainedModel) -> None:
        """Quantises ``model``, adds an adapter, masked if it will be merged into masks, and freezes everything else."""
        quantise(model, self.quantization, self.double_quant)
        structure.write(model, form=self.form)
        add_adapter(model, lora_config(self, model), masked=self.form != "adapter" and structure.masked(model))

    def detach(self, model: PreTrainedModel) -> None:
        """Raises TypeError: a quantised model cannot be cut again."""
        raise TypeError("the adapter of QLoRA cannot be merged into quantised weights in place.")
