"""Reading .gguf files of other tools; those of lit_prune are read back in the tests of their format."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.models.files.gguf_file import _halves
from lit_prune.models.load import load_config, load_model, load_tokenizer

LOADERS = [load_config, load_model, load_tokenizer]


def write_gguf(path: Path, architecture: str = "llama", scaling: str | None = None, more: str | None = None) -> Path:
    """Writes a Llama of two blocks with a byte-level BPE vocabulary, as llama.cpp's converter lays it out.

    Args:
        path: Path of the file.
        architecture: llama.cpp's name of the architecture.
        scaling: Type of the scaling of rotary embeddings.
        more: Name of one more tensor.
    """
    gguf = pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    width, heads, inner, words = 32, 4, 48, 300
    random = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(words)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [a + b for a in "abcdefg" for b in "abcdefg"][: words - len(alphabet)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * words)
    writer.add_token_merges([f"{token[0]} {token[1]}" for token in tokens[len(alphabet) :]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, (torch.randn(shape, generator=random) * 0.1).numpy())

    add("token_embd.weight", words, width)
    add("output.weight", words, width)
    add("output_norm.weight", width)
    if more is not None:
        add(more, width)
    for block in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{block}.{name}.weight", width, width)
        add(f"blk.{block}.attn_norm.weight", width)
        add(f"blk.{block}.ffn_norm.weight", width)
        add(f"blk.{block}.ffn_gate.weight", inner, width)
        add(f"blk.{block}.ffn_up.weight", inner, width)
        add(f"blk.{block}.ffn_down.weight", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_rows_of_a_head_by_hand() -> None:
    rows = torch.tensor([0, 2, 1, 3, 10, 12, 11, 13])  # two heads of 4 dimensions
    assert _halves(rows, 4).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert _halves(rows[:, None].expand(-1, 5), 4)[:, 4].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.parametrize("scaling", [None, "none"])
def test_a_file_can_be_loaded_and_saved(scaling: str | None, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", scaling=scaling)
    model, tokenizer = load_model(str(file)), load_tokenizer(str(file))
    assert model.dtype == torch.float32
    assert load_config(str(file)).num_hidden_layers == 2
    model.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"


def test_the_type_and_the_attention_can_be_given(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    model = load_model(str(file), "bfloat16", attn_implementation="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("architecture", ["deci", "granite"])
def test_an_architecture_that_transformers_does_not_know(
    architecture: str, load: Callable[[str], object], tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "blocks.gguf", architecture)
    told = rf"must be a \.gguf file .*got {re.escape(str(file))} with the architecture `{architecture}`, .*: give the"
    with pytest.raises(InputError, match=told):
        load(str(file))


@pytest.mark.parametrize(
    ("scaling", "more", "part"),
    [
        ("linear", None, "scaled rotary embeddings"),
        ("yarn", None, "scaled rotary embeddings"),
        (None, "rope_freqs.weight", "scaled rotary embeddings"),
        (None, "blk.0.attn_q.bias", "biases"),
        (None, "blk.1.ffn_down.bias", "biases"),
    ],
)
def test_what_transformers_would_ignore_is_refused(
    scaling: str | None, more: str | None, part: str, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", scaling=scaling, more=more)
    with pytest.raises(InputError, match=rf"that transformers reads, got .*tiny.gguf with {part}, which it does not"):
        load_model(str(file))


@pytest.mark.parametrize("length", [0, 3, 7, 100, 2000, -100])
def test_a_file_that_is_damaged(length: int, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:length])
    for load in LOADERS:
        with pytest.raises(InputError, match=r"tiny.gguf' cannot be loaded: it is damaged \(.*\): download or copy it"):
            load(str(file))
