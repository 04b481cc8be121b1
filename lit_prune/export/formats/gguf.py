"""The .gguf file that llama.cpp and what is built on it run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.errors import InputError
from lit_prune.export.formats.base import ExportFormat, Tolerance
from lit_prune.export.llama_cpp import OutType, check_packages, check_vocabulary, convert
from lit_prune.export.plan import ExportPlan, Outline
from lit_prune.models.families import dense_family, head_dim
from lit_prune.models.files.gguf_file import CONFIG, TOKENIZER, read_model, tokenizer_metadata
from lit_prune.progress import log
from lit_prune.target import StoredBytes

FILE = "model.gguf"


@dataclass(frozen=True)
class Support:
    """The models of a family that llama.cpp loads.

    Attributes:
        biases: Whether linears may have biases.
        square: Whether the heads must add up to the width of the residual stream.
        tied: Whether the head must be tied to the embedding, or must not; None allows both.
        window: Whether sliding windows of the attention are known.
    """

    biases: bool = False
    square: bool = False
    tied: bool | None = None
    window: bool = False


# Families whose files ``gguf_file`` reads back and the tests run in llama.cpp.
FAMILIES = {
    "cohere": Support(square=True, tied=True),
    "granite": Support(biases=True, square=True),
    "llama": Support(biases=True),
    "mistral": Support(biases=True),
    "olmo": Support(square=True),
    "olmo2": Support(square=True, tied=False),
    "olmo3": Support(square=True, tied=False, window=True),
    "qwen2": Support(biases=True, square=True),
    "qwen3": Support(),
    "smollm3": Support(),
}
BY_BLOCK = ("llama", "mistral")  # those whose blocks may be of different sizes
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # that files can describe
Q8_ROW = 32  # weights with one scale in q8_0; rows of other lengths are stored in f16
OUT_TYPES: dict[torch.dtype, OutType] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# 8 bits with one scale for 32 weights: an error of half of 1/127 of the largest, and that of the scale, which is f16
TOLERANCES = {
    "f16": Tolerance(weights=2**-11, logits=0.01, perplexity=0.01),
    "bf16": Tolerance(weights=2**-8, logits=0.05, perplexity=0.01),
    "q8_0": Tolerance(weights=0.0045, logits=0.1, perplexity=0.02),
}


@final
@dataclass(frozen=True)
class GGUF(ExportFormat):
    """One `model.gguf` with weights, config and tokenizer, which llama.cpp runs.

    It is written by llama.cpp's own converter. It holds models in full precision, whose adapter is merged, of the
    families llama, mistral, qwen2, qwen3, smollm3, granite, cohere, olmo, olmo2 and olmo3; of llama and mistral also
    those that were shrunk to blocks of different sizes. Masked weights are stored as zeros, so that the file is no
    smaller.

    Args:
        outtype: Type of the matrices: f32, f16, bf16 or q8_0 (8 bits); auto is that of the model. Vectors are f32.
    """

    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"

    opened_as_stored = True

    def __post_init__(self) -> None:
        types = ("auto", *get_args(OutType))
        if self.outtype not in types:
            raise InputError(f"`format.outtype` must be one of {', '.join(types)}, got {self.outtype!r}.")

    @property
    def tolerance(self) -> Tolerance:
        """What rounding to another type explains; nothing for the model's own type and for f32."""
        return TOLERANCES.get(self.outtype, Tolerance())

    @property
    def library_name(self) -> None:
        """None: the hub knows the readers of a .gguf file by its tag."""

    @property
    def tags(self) -> Sequence[str]:
        """The tag of repositories with .gguf files."""
        return ("gguf",)

    def check(self, outline: Outline) -> None:
        """Raises InputError for a model that a .gguf file cannot hold, and without the packages."""
        if outline.form == "adapter":
            remedy = "train with `--pruning.recovery MaskedLoRA`, which keeps the zeros and is merged"
            if outline.quantised:
                remedy = "train with `--pruning.recovery.form merged`"
            raise InputError(f"`format` GGUF must have the adapter merged, got one beside the weights: {remedy}.")
        if outline.quantised:
            raise InputError(
                "`format` GGUF must have weights in full precision, got weights that bitsandbytes quantised: train "
                "with `--pruning.recovery.form merged`, and quantise by `--format.outtype q8_0`."
            )
        if outline.on_disk:
            raise InputError("`model.on_disk` must be false for `format` GGUF, which is verified in memory.")
        if outline.custom_class == "sliced":
            raise InputError(
                "`format` GGUF must not have a sliced model, whose shortcut matrices llama.cpp does not have: use "
                "`--format HuggingFace`, or shrink by MLPWidth or HeadGroups."
            )
        if outline.custom_class == "shrunk" and outline.family not in BY_BLOCK:
            raise InputError(
                f"`format` GGUF must have blocks of one size for the family {outline.family}: use "
                f"`--pruning.allocation Uniform`. Only for {' and '.join(BY_BLOCK)} llama.cpp has blocks of different "
                "sizes."
            )
        if outline.family not in FAMILIES:
            raise InputError(
                f"`format` GGUF must have a model of the families {', '.join(FAMILIES)}, got {outline.family}: use "
                "`--format HuggingFace`, and llama.cpp's convert_hf_to_gguf.py on the folder."
            )
        _check_biases(outline)
        _check_fewer(outline)
        check_packages()

    def check_model(self, model: PreTrainedModel, tokenizer: Tokenizer | None) -> None:
        """Raises InputError without a tokenizer, and for a model or a tokenizer that llama.cpp does not support."""
        if tokenizer is None:
            raise InputError("`format` GGUF must have a data module with a `tokenizer`, which is part of the file.")
        _check_shape(model)
        check_vocabulary(model, tokenizer)

    def write(self, plan: ExportPlan, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes model.gguf; with masks, prints that the file is no smaller."""
        assert tokenizer is not None  # checked
        _check_shape(plan.plain)
        folder.mkdir(parents=True, exist_ok=True)
        if plan.outline.masked:
            log(f"{FILE} stores pruned weights as zeros: it is as large as without the masks.")
        rows = [parameter.shape[-1] for parameter in plan.plain.parameters() if parameter.ndim > 1]
        if self.outtype == "q8_0" and (others := [row for row in rows if row % Q8_ROW]):
            log(f"{len(others)} of {len(rows)} matrices are stored in f16, since {Q8_ROW} does not divide their rows.")
        if (window := _window(plan.plain)) is not None:
            log(
                f"llama.cpp has no sliding window for {plan.outline.family}: beyond {window} tokens its output differs."
            )
        convert(
            plan.plain,
            tokenizer,
            folder / FILE,
            self._outtype(plan.plain.dtype),
            name=_name(plan.model),
            metadata={
                CONFIG: plan.plain.config.to_json_string(use_diff=False),
                TOKENIZER: tokenizer_metadata(tokenizer),
            },
        )

    def open(
        self,
        folder: Path,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        on_disk: bool = False,
        trust_remote_code: bool = False,
    ) -> PreTrainedModel:
        """Returns the model in the file, by default in the type of its matrices, or in float32 for q8_0."""
        return read_model(folder / FILE, dtype).to(device)  # type: ignore[arg-type]

    def bytes(self, plan: ExportPlan) -> int:
        """Returns the bytes of the tensors, without those of the vocabulary."""
        outtype = self._outtype(plan.plain.dtype)
        return sum(_bytes(parameter, outtype) for parameter in plan.plain.parameters())

    def stored_bytes(self, model: PreTrainedModel, dtype: torch.dtype) -> StoredBytes:
        """Returns the bytes of the tensors of ``model`` in a file, without those of the vocabulary."""
        outtype = self._outtype(dtype)
        total = sum(_bytes(parameter, outtype) for parameter in model.parameters())
        if outtype == "q8_0":
            return StoredBytes(total, 34 / Q8_ROW, Q8_ROW)
        return StoredBytes(total, 4.0 if outtype == "f32" else 2.0)

    def dtype(self, plan: ExportPlan) -> str:
        """Returns the name of the data type of the matrices."""
        names = {outtype: str(dtype).removeprefix("torch.") for dtype, outtype in OUT_TYPES.items()}
        outtype = self._outtype(plan.plain.dtype)
        return names.get(outtype, outtype)

    def usage(self, outline: Outline, tokenizer: str, imports: Sequence[str] = ()) -> str:
        """Returns the command of llama.cpp that runs the file, and the option by which lit-prune opens it.

        No lines of Python: of the config, transformers reads only what llama.cpp has fields for.
        """
        command = f'llama-cli -m this/folder/{FILE} -p "Once upon a time"'
        further = f"To prune or train it further, give lit-prune `--model.pretrained this/folder/{FILE}`."
        return "\n".join(["```sh", command, "```", "", further])

    def _outtype(self, dtype: torch.dtype) -> OutType:
        if self.outtype != "auto":
            return self.outtype
        if dtype not in OUT_TYPES:
            raise InputError(f"`format.outtype` must be given for a model in {str(dtype).removeprefix('torch.')}.")
        return OUT_TYPES[dtype]


def _name(model: PreTrainedModel) -> str:
    """Returns the name of the folder or the repository of ``model``, or of its class if it was made in code."""
    path = Path(model.name_or_path or type(model).__name__)
    if path.exists():
        path = path.resolve()  # `.` has no name
    return (path.parent if path.suffix == Path(FILE).suffix else path).name or type(model).__name__


def _check_biases(outline: Outline) -> None:
    """Raises InputError for biases that llama.cpp does not load."""
    if not outline.biased:
        return
    if outline.custom_class == "shrunk":
        raise InputError(
            "`format` GGUF must have blocks of one size for a model with biases: use `--pruning.allocation Uniform`."
        )
    if not FAMILIES[outline.family].biases:
        raise InputError(
            f"`format` GGUF must have no biases in the linears of the family {outline.family}, for which llama.cpp "
            "loads none: use `--format HuggingFace`."
        )


def _check_fewer(outline: Outline) -> None:
    """Raises InputError for a cut after which llama.cpp cannot load a model of the family."""
    if FAMILIES[outline.family].square and outline.fewer & {"heads", "dimensions"}:
        raise InputError(
            f"`format` GGUF must have a model of the family {outline.family} with as many dimensions in its heads as "
            "in its residual stream, which HeadGroups and HiddenWidth change: use `--format HuggingFace`, or shrink by "
            "MLPWidth or Depth."
        )
    if outline.family == "smollm3" and "blocks" in outline.fewer:
        raise InputError(
            "`format` GGUF must have a SmolLM3 with all blocks, as llama.cpp takes for granted which of them have "
            "rotary embeddings: use `--format HuggingFace`, or shrink by MLPWidth."
        )


def _check_shape(model: PreTrainedModel) -> None:
    """Raises InputError for a model that llama.cpp cannot load, or of which it would compute something else.

    Besides what a family's :class:`Support` says, its SmolLM3 has a fixed pattern of rotary embeddings, and its Cohere
    no norms of queries and keys. A file has no place for the activation of the MLPs, and none for some kinds of rotary
    embeddings.
    """
    config = model.config
    family, width = dense_family(config), head_dim(config)
    support = FAMILIES.get(family, Support())
    if support.square and width * config.num_attention_heads != config.hidden_size:
        raise InputError(
            f"`format` GGUF must have a model of the family {family} with as many dimensions in its heads as in its "
            f"residual stream, got {config.num_attention_heads} of {width} for {config.hidden_size}: use `--format "
            "HuggingFace`."
        )
    if support.tied not in (None, config.tie_word_embeddings):
        tied = "tied to the embedding" if support.tied else "of its own, not tied to the embedding"
        raise InputError(f"`format` GGUF must have a head {tied} for the family {family}: use `--format HuggingFace`.")
    if getattr(config, "use_qk_norm", False) and family == "cohere":
        raise InputError("`format` GGUF must have a Cohere without `use_qk_norm`: use `--format HuggingFace`.")
    without_rope = [block for block, rotates in enumerate(getattr(config, "no_rope_layers", None) or []) if not rotates]
    if config.model_type == "smollm3" and without_rope != list(range(3, config.num_hidden_layers, 4)):
        raise InputError(
            "`format` GGUF must have a SmolLM3 with rotary embeddings in all blocks but every fourth, which llama.cpp "
            f"takes for granted, got none in {without_rope}: use `--format HuggingFace`."
        )
    if (activation := getattr(config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise InputError(
            f"`format` GGUF must have a model with the activation silu, which llama.cpp takes for granted, got "
            f"{activation}: use `--format HuggingFace`."
        )
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise InputError(
            f"`format` GGUF must have rotary embeddings of the types {', '.join(ROPE_TYPES)}, got {kind}: use "
            "`--format HuggingFace`."
        )


def _window(model: PreTrainedModel) -> int | None:
    """Returns the sliding window that llama.cpp does not know; None if every token attends to all before it."""
    config = model.config
    if FAMILIES[dense_family(config)].window:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]  # Mistral lists none
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


def _bytes(parameter: torch.Tensor, outtype: OutType) -> int:
    """Returns the bytes of a tensor in the file: vectors in f32, and no 8 bits for rows that 32 does not divide."""
    if parameter.ndim < 2 or outtype == "f32":
        return 4 * parameter.numel()
    if outtype == "q8_0" and parameter.shape[-1] % Q8_ROW == 0:
        return parameter.numel() // Q8_ROW * 34
    return 2 * parameter.numel()
