"""llama.cpp's converter, and the pre-tokenizers that it is told."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_prune.errors import InputError
from lit_prune.export import llama_cpp
from lit_prune.export.llama_cpp import QWEN2, check_packages, check_vocabulary, convert
from lit_prune.models.load import load_tokenizer
from tests.conftest import small_model
from tests.export.running import LlamaCpp

TEXT = "Price 1234.5, I've  paid'S it\n\n in 日本 Ünïcode -- twice!?\t\tx=1 "
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
RULES: dict[str, tuple[Any, Any]] = {
    "gpt-2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": (
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "qwen2": (
        normalizers.NFC(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES]),
    ),
}


def tokenizer_with(normalizer: Any, pre_tokenizer: Any) -> Any:
    """The embedded tokenizer with other rules before its BPE."""
    tokenizer = copy.deepcopy(load_tokenizer("embedded"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


class NoModules:
    """Finds no modules in any folder."""

    @staticmethod
    def find_spec(name: str, path: list[str]) -> None:
        return None


@pytest.mark.parametrize("name", RULES)
def test_llama_cpp_tokenises_by_the_rules_that_it_is_told(name: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tokenizer, file = tokenizer_with(*RULES[name]), tmp_path / "model.gguf"
    convert(small_model("llama", vocab_size=4096), tokenizer, file, "f32", name="small", metadata={"a.b": "text"})
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["general.name"].contents() == "small"
    assert fields["a.b"].contents() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert LlamaCpp(file, n_ctx=64).tokenize(TEXT) == tokenizer(TEXT)["input_ids"]


def sentencepiece(texts: list[str]) -> Any:
    """A vocabulary like that of Llama 2: BPE over characters, with bytes for those that are unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # the trainer knows words, SentencePiece merges within words only too
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, special_tokens=special))
    tokenizer.pre_tokenizer = None
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def test_llama_cpp_tokenises_by_the_merges_of_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    tokenizer, file = sentencepiece([str.__doc__, Path(__file__).read_text()] * 3), tmp_path / "model.gguf"
    model = small_model("llama", vocab_size=len(tokenizer))
    check_vocabulary(model, tokenizer)
    convert(model, tokenizer, file, "f32", name="small", metadata={})
    text = "the tokenizers of a vocabulary that llama.cpp tokenises, naïvely: 日本"
    assert len(tokenizer(text)["input_ids"]) < 45
    assert LlamaCpp(file, n_ctx=64).tokenize(text) == tokenizer(text)["input_ids"]


def test_rules_without_a_name_are_refused() -> None:
    tokenizer = tokenizer_with(None, pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(
        InputError, match=r"LlamaForCausalLM with TokenizersBackend \(the pre-tokenizer must be that of"
    ):
        check_vocabulary(small_model("llama", vocab_size=4096), tokenizer)


def test_a_vocabulary_larger_than_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="must have a model and a tokenizer that llama.cpp's converter supports"):
        check_vocabulary(small_model("llama"), load_tokenizer("embedded"))


def test_a_vocabulary_that_is_no_bpe_is_refused() -> None:
    tokenizer = copy.deepcopy(load_tokenizer("embedded"))
    tokenizer._tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(InputError, match="must have a model and a tokenizer that llama.cpp's converter supports"):
        check_vocabulary(small_model("llama", vocab_size=4096), tokenizer)


def test_a_class_without_a_converter_is_refused() -> None:
    with pytest.raises(InputError, match="must have a model that llama.cpp has a converter for, got OPTForCausalLM"):
        check_vocabulary(small_model("opt", vocab_size=4096), load_tokenizer("embedded"))


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages()
    found = llama_cpp.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "auto_round" else found(name))
    with pytest.raises(
        InputError, match=r"needs the package auto-round. Install it by: pip install 'lit-prune\[gguf\]'"
    ):
        check_packages()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package gguf and auto-round"):
        check_packages()


def test_a_version_without_the_converter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(llama_cpp.sys.modules, "conversion", raising=False)
    monkeypatch.setattr(llama_cpp, "PathFinder", NoModules)
    with pytest.raises(InputError, match="needs a version of auto-round that has llama.cpp's converter, .* has none"):
        check_vocabulary(small_model("llama", vocab_size=4096), load_tokenizer("embedded"))
