"""The .gguf file, run by llama.cpp and read back."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, Uniform
from lit_prune.depth import Depth
from lit_prune.errors import InputError
from lit_prune.export.formats import GGUF
from lit_prune.export.formats.gguf import FAMILIES, FILE
from lit_prune.export.plan import ExportPlan, Outline
from lit_prune.export.verify import verify
from lit_prune.hidden import HiddenWidth
from lit_prune.models.load import load_config, load_model, load_tokenizer, new_model
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude, Method
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from tests.conftest import lively_model
from tests.export.running import LlamaCpp, complete, logprobs, perplexity

TEXTS = [
    "Return the number of items in a container.",
    "  x = 3.14\n\n\tif x:\n",
    "naïve façade, 2024's 日本語 🚀!",
    "don't",
]
TYPES = [(torch.float32, outtype) for outtype in ("auto", "f32", "f16", "bf16", "q8_0")]
TYPES += [(torch.bfloat16, outtype) for outtype in ("auto", "q8_0")]
FIELDS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 3},
    "qwen3": {"sliding_window": None},
    "smollm3": {"sliding_window": None},
}


def small(family: str, **fields: object) -> PreTrainedModel:
    """A model of the family with the vocabulary of the embedded one."""
    size = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    return lively_model(family, **{**size, **FIELDS.get(family, {}), **fields})


def rope(kind: str, **fields: object) -> dict[str, Any]:
    """Rotary embeddings of a type, whose first 16 positions were trained."""
    shared = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    return {"rope_parameters": {**shared, **fields}}


def write(model: PreTrainedModel, folder: Path, outtype: str = "auto") -> ExportPlan:
    plan = ExportPlan.of(model)
    GGUF(outtype).write(plan, folder, load_tokenizer("embedded"))  # type: ignore[arg-type]
    return plan


@pytest.fixture(scope="module")
def embedded() -> PreTrainedModel:
    return load_model("embedded", "float32")


@pytest.fixture(scope="module")
def running(embedded: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    folder = tmp_path_factory.mktemp("embedded")
    write(embedded, folder)
    return LlamaCpp(folder / FILE)


def test_llama_cpp_continues_a_text_as_transformers_does(embedded: PreTrainedModel, running: LlamaCpp) -> None:
    tokenizer = load_tokenizer("embedded")
    ids = tokenizer("Return True if the")["input_ids"]
    assert running.complete(ids, 24) == tokenizer.decode(complete(embedded, ids, 24))


def test_llama_cpp_has_the_perplexity_of_transformers(embedded: PreTrainedModel, running: LlamaCpp) -> None:
    ids = load_tokenizer("embedded")(TEXTS[0] + " If the file is not open, an error is raised.")["input_ids"]
    expected = perplexity(logprobs(embedded, ids, len(ids) - 1))
    assert perplexity(running.logprobs(ids, len(ids) - 1)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_tokenises_as_transformers_does(text: str, running: LlamaCpp) -> None:
    assert running.tokenize(text) == load_tokenizer("embedded")(text)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    model, ids = small(family), list(range(5, 25))
    verify(tmp_path, write(model, tmp_path), GGUF())
    torch.testing.assert_close(LlamaCpp(tmp_path / FILE).logprobs(ids, 4), logprobs(model, ids, 4), atol=0.01, rtol=0)


def test_blocks_of_different_sizes_by_llama_cpp(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    sizes = {"intermediate_size": [32, 96, 64], "num_attention_heads": [2, 4, 6], "num_key_value_heads": [1, 2, 3]}
    model, ids = small("shrunk_llama", block_sizes=sizes), list(range(5, 25))
    GGUF().check(Outline.of(model))
    GGUF().check_model(model, load_tokenizer("embedded"))
    verify(tmp_path, write(model, tmp_path), GGUF())
    fields = gguf.GGUFReader(tmp_path / FILE).fields
    assert fields["general.architecture"].contents() == "deci"
    assert fields["deci.feed_forward_length"].contents() == [32, 96, 64]
    assert fields["deci.attention.head_count"].contents() == [2, 4, 6]
    assert fields["deci.attention.head_count_kv"].contents() == [1, 2, 3]
    torch.testing.assert_close(LlamaCpp(tmp_path / FILE).logprobs(ids, 4), logprobs(model, ids, 4), atol=0.01, rtol=0)


def test_blocks_with_lists_of_equal_sizes_are_the_same_model(
    embedded: PreTrainedModel, running: LlamaCpp, tmp_path: Path
) -> None:
    fields = {
        **embedded.config.to_dict(),
        "model_type": "shrunk_llama",
        "block_sizes": {"intermediate_size": [512] * 8},
    }
    by_block = new_model(fields).eval()
    by_block.load_state_dict(embedded.state_dict())
    write(by_block, tmp_path)
    ids = load_tokenizer("embedded")("Return True if the")["input_ids"]
    assert LlamaCpp(tmp_path / FILE).complete(ids, 24) == running.complete(ids, 24)


def test_blocks_of_different_sizes_with_biases_are_refused(tmp_path: Path) -> None:
    model = small("shrunk_llama", attention_bias=True, block_sizes={"intermediate_size": [32, 96, 64]})
    with pytest.raises(InputError, match="must have blocks of one size for a model with biases"):
        GGUF().check(Outline.of(model))
    dense, recipe = small("llama", attention_bias=True), Recipe(MLPWidth(multiple=8), allocation=DLP())
    expected = Outline.expected(dense, recipe, LoRA())
    assert expected is not None
    with pytest.raises(InputError, match="must have blocks of one size for a model with biases"):
        GGUF().check(expected)
    GGUF().check(Outline.of(dense))


@pytest.mark.parametrize("family", ["cohere", "olmo", "olmo2", "olmo3", "qwen3", "smollm3"])
def test_families_whose_biases_llama_cpp_does_not_load(family: str) -> None:
    GGUF().check(Outline.of(small(family)))
    model = small(family, attention_bias=True)
    with pytest.raises(InputError, match=f"must have no biases in the linears of the family {family}"):
        GGUF().check(Outline.of(model))
    LoRA().attach(model)
    with pytest.raises(InputError, match=f"must have no biases in the linears of the family {family}"):
        GGUF().check(Outline.of(model))


CUTS: list[tuple[str, Method, str]] = [
    (
        "qwen2",
        HeadGroups(),
        "of the family qwen2 with as many dimensions in its heads .*, which HeadGroups and ",
    ),
    ("granite", HeadGroups(), "of the family granite with as many dimensions in its heads .*, which HeadGroups"),
    ("qwen2", Shrink([MLPWidth(), HiddenWidth()]), "of the family qwen2 with as many dimensions in its heads as in"),
    ("smollm3", Depth(), "must have a SmolLM3 with all blocks, as llama.cpp takes for granted which"),
]


@pytest.mark.parametrize(("family", "method", "message"), CUTS)
def test_cuts_that_no_file_can_hold_are_refused_before(family: str, method: Method, message: str) -> None:
    model = small(family)
    GGUF().check(Outline.of(model))
    for recovery in (None, FullFineTuning()):
        expected = Outline.expected(model, Recipe(method), recovery)
        assert expected is not None
        with pytest.raises(InputError, match=message):
            GGUF().check(expected)
    expected = Outline.expected(small("llama"), Recipe(method), None)
    assert expected is not None
    GGUF().check(expected)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "the activation silu, which llama.cpp takes for granted, got gelu"),
        ("cohere", {"tie_word_embeddings": False}, "must have a head tied to the embedding for the family cohere"),
        ("olmo2", {"tie_word_embeddings": True}, "a head of its own, not tied to the embedding for the family olmo2"),
        ("cohere", {"use_qk_norm": True}, "must have a Cohere without `use_qk_norm`"),
        ("qwen3", {"hidden_act": "relu"}, "the activation silu, which llama.cpp takes for granted, got relu"),
        (
            "llama",
            rope("dynamic"),
            "of the types default, linear, llama3, yarn, got dynamic: use",
        ),
        ("llama", rope("longrope", short_factor=[1.0] * 8, long_factor=[3.0] * 8), "llama3, yarn, got longrope: use"),
    ],
)
def test_what_llama_cpp_would_not_compute_is_refused(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GGUF().check_model(small(family, **fields), load_tokenizer("embedded"))


def test_sliding_windows_that_llama_cpp_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    model, ids = small("olmo3", sliding_window=8, layer_types=layer_types), list(range(5, 25))
    write(model, tmp_path)
    assert "sliding window" not in capsys.readouterr().err
    torch.testing.assert_close(LlamaCpp(tmp_path / FILE).logprobs(ids, 4), logprobs(model, ids, 4), atol=0.01, rtol=0)
    wider = logprobs(small("olmo3", sliding_window=4096, layer_types=layer_types), ids, 4)
    assert (wider - logprobs(model, ids, 4)).abs().max() > 0.1


LLAMA3 = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)
OPENED: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", rope("linear")),
    ("llama", LLAMA3),
    ("llama", {"attention_bias": True}),
    ("qwen3", {"head_dim": 8}),
    ("shrunk_llama", {**LLAMA3, "block_sizes": {"intermediate_size": [32, 96, 64]}}),
]


@pytest.mark.parametrize(("family", "fields"), OPENED)
def test_a_file_is_opened_as_the_model_that_it_was_written_from(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model, file, ids = small(family, **fields), str(tmp_path / FILE), torch.arange(5, 25)[None]
    write(model, tmp_path)
    opened = load_model(file)
    assert (type(opened), opened.training) == (type(model), False)
    assert opened.config.to_dict() == load_config(file).to_dict()
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    embedded, tokenizer = load_tokenizer("embedded"), load_tokenizer(file)
    assert all(tokenizer(text)["input_ids"] == embedded(text)["input_ids"] for text in TEXTS)
    assert (tokenizer.eos_token, tokenizer.chat_template) == (embedded.eos_token, embedded.chat_template)


def test_the_tokenizer_of_a_file_is_the_exported_one(tmp_path: Path) -> None:
    exported = load_tokenizer("embedded")
    # transformers knows no pre-tokenizer `smollm`, and would split digits and spaces as GPT-2 does
    by_digit = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    exported.backend_tokenizer.pre_tokenizer = by_digit
    exported.chat_template = "{{ messages[0]['content'] }} é"
    model = small("llama")
    GGUF().write(ExportPlan.of(model), tmp_path, exported)
    opened = load_tokenizer(str(tmp_path / FILE))
    for text in (*TEXTS, " \n\n12", "x  = 345"):
        assert opened(text)["input_ids"] == exported(text)["input_ids"]
    assert opened.get_vocab() == exported.get_vocab()
    assert opened.special_tokens_map == exported.special_tokens_map
    assert opened.chat_template == exported.chat_template
    assert opened.name_or_path == str(tmp_path / FILE)


def test_a_file_of_a_class_of_ours_is_opened_in_a_fresh_process(tmp_path: Path) -> None:
    write(small("shrunk_llama", block_sizes={"intermediate_size": [32, 96, 64]}), tmp_path)
    code = f"from lit_prune.models.load import load_config; print(load_config({str(tmp_path / FILE)!r}).block_sizes)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'intermediate_size': [32, 96, 64]}"


@pytest.mark.parametrize(("outtype", "dtype"), [("bf16", torch.bfloat16), ("q8_0", torch.float32)])
def test_a_file_is_opened_in_the_type_of_its_matrices(outtype: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write(small("llama"), tmp_path, outtype)
    assert load_model(str(tmp_path / FILE)).dtype == load_config(str(tmp_path / FILE)).dtype == dtype
    model = load_model(str(tmp_path / FILE), "float16", attn_implementation="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.float16, "eager")


@pytest.mark.parametrize("sizes", [None, {"intermediate_size": [32, 96, 64]}])
@pytest.mark.parametrize(
    "fields",
    [rope("linear"), rope("yarn"), LLAMA3],
    ids=["linear", "yarn", "llama3"],
)
def test_scaled_rotary_embeddings(fields: dict[str, Any], sizes: dict[str, list[int]] | None, tmp_path: Path) -> None:
    """The length that llama3 scales from is 16 here, and 8,192 in published models."""
    model = small("llama", **fields) if sizes is None else small("shrunk_llama", **fields, block_sizes=sizes)
    GGUF().check_model(model, load_tokenizer("embedded"))
    ids = list(range(5, 25))
    verify(tmp_path, write(model, tmp_path), GGUF())
    torch.testing.assert_close(LlamaCpp(tmp_path / FILE).logprobs(ids, 4), logprobs(model, ids, 4), atol=0.01, rtol=0)


def test_a_file_is_the_same_every_time_and_names_no_temporary_folder(tmp_path: Path) -> None:
    model = small("llama", architectures=["LlamaForCausalLM"])
    model.name_or_path = "hub/Tiny-3M"
    for folder in ("one", "two"):
        write(model, tmp_path / folder)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    assert b".huggingface-" not in (tmp_path / "one" / FILE).read_bytes()


@pytest.mark.parametrize("source", [".", FILE, "/", "Tiny", ""])
def test_a_model_from_the_working_directory_has_its_name(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf, folder = pytest.importorskip("gguf"), tmp_path / "Tiny"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / FILE).touch()
    model = small("llama")
    model.name_or_path = source
    write(model, tmp_path / "out")
    name = gguf.GGUFReader(tmp_path / "out" / FILE).fields["general.name"].contents()
    assert name == ("Tiny" if source not in ("/", "") else "LlamaForCausalLM")


def test_rows_that_are_stored_in_f16_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(small("llama", intermediate_size=80), tmp_path, "q8_0")
    assert "3 of 22 matrices are stored in f16, since 32 does not divide their rows." in capsys.readouterr().err
    write(small("llama"), tmp_path, "q8_0")
    assert "are stored in f16" not in capsys.readouterr().err


@pytest.mark.parametrize("method", [MLPWidth(multiple=16), HeadGroups(), Depth()])
def test_what_was_shrunk_evenly_is_of_its_family(method: Method, tmp_path: Path) -> None:
    model, ids = small("llama"), list(range(5, 25))
    prune(model, [torch.randint(1, 64, (2, 16))], Recipe(method, 0.5, Uniform()))
    verify(tmp_path, write(model, tmp_path), GGUF())
    torch.testing.assert_close(LlamaCpp(tmp_path / FILE).logprobs(ids, 4), logprobs(model, ids, 4), atol=0.01, rtol=0)


def test_a_smollm3_with_other_blocks_without_rotary_embeddings_is_refused() -> None:
    model = small("smollm3", no_rope_layers=[1, 0, 1])
    with pytest.raises(InputError, match=r"must have a SmolLM3 with rotary embeddings .* got none in \[1\]"):
        GGUF().check_model(model, load_tokenizer("embedded"))


@pytest.mark.parametrize(("dtype", "outtype"), TYPES)
def test_every_type_is_read_back(dtype: torch.dtype, outtype: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    small("llama").to(dtype).save_pretrained(tmp_path / "dense")
    plan = write(load_model(str(tmp_path / "dense")), tmp_path / "model", outtype)
    exported = GGUF(outtype)  # type: ignore[arg-type]
    verify(tmp_path / "model", plan, exported)
    stored = gguf.GGUFReader(tmp_path / "model" / FILE).tensors
    assert exported.bytes(plan) == sum(int(tensor.n_bytes) for tensor in stored)
    expected = {"auto": "F32" if dtype is torch.float32 else "BF16"}.get(outtype, outtype.upper())
    assert {tensor.tensor_type.name for tensor in stored if ".ffn_" in tensor.name} - {"F32"} <= {expected}
    assert next(tensor for tensor in stored if tensor.name == "token_embd.weight").tensor_type.name == expected


@pytest.mark.parametrize("outtype", ["auto", "f32", "f16", "q8_0"])
def test_a_file_with_other_weights_is_not_kept(outtype: str, tmp_path: Path) -> None:
    model = small("llama")
    plan = write(model, tmp_path, outtype)
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").data
    weight[3, 4] += 0.02 * weight.abs().max()
    with pytest.raises(RuntimeError, match=r"model.layers.1.mlp.up_proj.weight is not what was written"):
        verify(tmp_path, plan, GGUF(outtype))  # type: ignore[arg-type]


def test_masks_are_stored_as_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small("llama")
    prune(model, [torch.randint(1, 64, (2, 16))], Recipe(Magnitude(), 0.5, Uniform()))
    plan = write(model, tmp_path)
    assert "model.gguf stores pruned weights as zeros: it is as large as without the masks." in (
        capsys.readouterr().err
    )
    verification = verify(tmp_path, plan, GGUF())
    assert verification.zeros_found == verification.zeros_expected == 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) // 2


@pytest.mark.parametrize(
    ("family", "fields", "window"),
    [
        ("mistral", {"sliding_window": 8}, 8),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 3}, 16),
        ("qwen2", {"sliding_window": 16}, None),
    ],
)
def test_a_sliding_window_is_pointed_out(
    family: str, fields: dict[str, Any], window: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(small(family, **fields), tmp_path)
    told = f"llama.cpp has no sliding window for {family}: beyond {window} tokens its output differs."
    assert (told in capsys.readouterr().err) is (window is not None)


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        (Outline("adapter", "llama", masked=True), "must have the adapter merged, got one beside the weights: train"),
        (Outline("adapter", "llama", quantised=True), "adapter merged, .* train with `--pruning.recovery.form merged`"),
        (Outline("quantised", "llama", quantised=True), "must have weights in full precision, got weights that"),
        (Outline("full precision", "llama", on_disk=True), "`model.on_disk` must be false for `format` GGUF"),
        (Outline("full precision", "llama", custom_class="sliced"), "must not have a sliced model, whose shortcut"),
        (Outline("merged", "qwen3", custom_class="shrunk"), "blocks of one size for the family qwen3: use.*Uniform"),
        (Outline("full precision", "opt"), "of the families cohere, granite, llama, mistral, .*smollm3, got opt: use"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_before_a_missing_package(
    outline: Outline, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    GGUF().check(Outline("merged", "llama", masked=True, reshaped=True))
    GGUF().check(Outline("merged", "mistral", reshaped=True, custom_class="shrunk"))
    monkeypatch.setattr("lit_prune.export.formats.gguf.check_packages", _missing)
    with pytest.raises(InputError, match=message):
        GGUF().check(outline)
    with pytest.raises(InputError, match="needs the package gguf"):
        GGUF().check(Outline("merged", "llama", reshaped=True))


def _missing() -> None:
    raise InputError("`format` GGUF needs the package gguf.")


def test_heads_that_llama_cpp_cannot_load_are_refused(tmp_path: Path) -> None:
    model = small("qwen2", head_dim=8)
    with pytest.raises(InputError, match="family qwen2 with as many dimensions in its heads.*, got 4 of 8 for 64"):
        GGUF().check_model(model, load_tokenizer("embedded"))
    with pytest.raises(InputError, match="got 4 of 8 for 64"):
        write(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_is_needed() -> None:
    GGUF().check_model(small("llama"), load_tokenizer("embedded"))
    with pytest.raises(InputError, match="`format` GGUF must have a data module with a `tokenizer`"):
        GGUF().check_model(small("llama"), None)


def test_the_card_has_the_command_of_llama_cpp() -> None:
    usage = GGUF().usage(Outline("full precision", "llama"), "this/folder")
    assert usage.splitlines()[1] == 'llama-cli -m this/folder/model.gguf -p "Once upon a time"'
    assert usage.endswith("give lit-prune `--model.pretrained this/folder/model.gguf`.")
    assert (GGUF().library_name, GGUF().tags) == (None, ("gguf",))


def test_the_type_is_asked_for_where_there_is_none_like_it() -> None:
    plan = ExportPlan.of(small("llama").to(torch.float64))
    with pytest.raises(InputError, match="`format.outtype` must be given for a model in float64"):
        GGUF().bytes(plan)
    assert GGUF("f32").bytes(plan) == 4 * sum(p.numel() for p in plan.plain.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_rounding_costs_little_perplexity(outtype: str, embedded: PreTrainedModel, tmp_path: Path) -> None:
    write(embedded, tmp_path, outtype)
    ids = load_tokenizer("embedded")(" ".join(TEXTS[:1] * 3) + " If the file is not open, an error is raised.")[
        "input_ids"
    ]
    expected = perplexity(logprobs(embedded, ids, len(ids) - 1))
    assert math.isclose(perplexity(LlamaCpp(tmp_path / FILE).logprobs(ids, len(ids) - 1)), expected, rel_tol=0.01)
