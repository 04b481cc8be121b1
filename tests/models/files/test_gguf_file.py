"""Reading .gguf files of other tools; those of lit_prune are read back in the tests of their format."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from lit_prune.errors import InputError
from lit_prune.models.files.gguf_file import CONFIG, _halves
from lit_prune.models.load import load_config, load_model, load_tokenizer

LOADERS = [load_config, load_model, load_tokenizer]


def write_gguf(
    path: Path,
    architecture: str = "llama",
    scaling: str | None = None,
    more: str | None = None,
    without: str | None = None,
    parts: int = 1,
    vocabulary: bool = True,
    ours: bool = False,
) -> Path:
    """Writes a Llama of two blocks with a byte-level BPE vocabulary, as llama.cpp's converter lays it out.

    Args:
        path: Path of the file.
        architecture: llama.cpp's name of the architecture.
        scaling: Type of the scaling of rotary embeddings.
        more: Name of one more tensor.
        without: Name of a tensor that is left out.
        parts: Number of parts of the model, of which the file is said to be one.
        vocabulary: Whether the file has one.
        ours: Whether it has a Hugging Face config, as files of lit_prune do.
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
    if ours:
        config = LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=2,
            num_attention_heads=heads,
            max_position_embeddings=64,
        )
        writer.add_string(CONFIG, config.to_json_string(use_diff=False))
    if parts > 1:
        writer.add_uint16("split.count", parts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [a + b for a in "abcdefg" for b in "abcdefg"][: words - len(alphabet)]
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.NORMAL] * words)
        writer.add_token_merges([f"{token[0]} {token[1]}" for token in tokens[len(alphabet) :]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)

    def add(name: str, *shape: int) -> None:
        if name != without:
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
    assert model.dtype == load_config(str(file)).dtype == torch.float32
    assert model.name_or_path == str(file)
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


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "token_embd.weight"])
def test_a_file_without_a_tensor_is_refused_instead_of_filled_with_random_weights(
    name: str, ours: bool, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", without=name, ours=ours)
    lacking = {"blk.1.ffn_down.weight": "layers.1.mlp.down_proj.weight", "token_embd.weight": "embed_tokens.weight"}
    with pytest.raises(InputError, match=rf"tiny.gguf' cannot be loaded: it has no model.{lacking[name]}: download"):
        load_model(str(file))


@pytest.mark.parametrize("load", LOADERS)
def test_a_part_of_a_model(load: Callable[[str], object], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny-00001-of-00003.gguf", parts=3)
    with pytest.raises(InputError, match=r"must be a whole model, got .*, which is one of 3 parts: .*--merge"):
        load(str(file))


def test_errors_of_transformers_become_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tiny.gguf' cannot be loaded: "):
        load_tokenizer(str(write_gguf(tmp_path / "tiny.gguf", vocabulary=False)))
    with pytest.raises(InputError, match=r"tiny.gguf' cannot be loaded: .*unknown"):
        load_model(str(write_gguf(tmp_path / "tiny.gguf")), attn_implementation="unknown")


def test_metadata_is_parsed_again_only_if_the_file_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    read: list[Path] = []
    parse = gguf.GGUFReader.__init__

    def counted(self: object, path: Path, *args: object) -> None:
        if isinstance(path, Path):  # transformers passes a text
            read.append(path)
        parse(self, path, *args)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    file = write_gguf(tmp_path / "tiny.gguf")
    for load in LOADERS:
        load(str(file))
    assert read == [file]
    write_gguf(file, parts=2)
    with pytest.raises(InputError, match="one of 2 parts"):
        load_config(str(file))
    assert read == [file, file]


@pytest.mark.parametrize("length", [0, 3, 7, 100, 2000, -100])
def test_a_file_that_is_damaged(length: int, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:length])
    for load in LOADERS:
        with pytest.raises(InputError, match=r"tiny.gguf' cannot be loaded: it is damaged \(.*\): download or copy it"):
            load(str(file))
