"""Cuts that make the residual stream narrower."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.allocate import DLP, Uniform
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.hidden import HiddenWidth
from lit_prune.hidden.stream_width import LAYOUTS
from lit_prune.models import structure
from lit_prune.models.load import load_model
from lit_prune.models.on_disk import offload_folder, save
from lit_prune.pipeline import prune
from lit_prune.pruning import Method, Wanda
from lit_prune.recipe import Recipe
from lit_prune.shrink import HeadGroups, MLPWidth
from lit_prune.slice import Slicing
from tests.conftest import lively_model, small_model

EIGHT = HiddenWidth(multiple=8)
PLAIN = HiddenWidth(multiple=8, compensate=False)


def error(model: PreTrainedModel, batches: list[Tensor], family: str, *, tied: bool) -> float:
    expected = lively_model(family, tie_word_embeddings=tied)(batches[0]).logits
    return float((model(batches[0]).logits - expected).square().mean() / expected.square().mean())


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", LAYOUTS)
def test_the_folder_is_of_the_familys_own_class(
    family: str, batches: list[Tensor], tmp_path: Path, *, tied: bool
) -> None:
    model, plain = (lively_model(family, tie_word_embeddings=tied) for _ in range(2))
    kind = type(model)
    assert prune(model, batches, Recipe(EIGHT, 0.25, Uniform())).achieved == [0.25] * 3
    prune(plain, batches, Recipe(PLAIN, 0.25, Uniform()))
    assert error(model, batches, family, tied=tied) < 0.5 * error(plain, batches, family, tied=tied)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is kind
    assert (opened.config.hidden_size, opened.config.head_dim, opened.model.norm.weight.shape) == (24, 8, (24,))
    assert list(tmp_path.glob("*.py")) == []
    torch.testing.assert_close(opened(batches[0]).logits, model(batches[0]).logits, rtol=1e-5, atol=1e-5)
    assert (opened.lm_head.weight is opened.model.embed_tokens.weight) is tied
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert opened.generate(batches[0], **settings).tolist() == model.generate(batches[0], **settings).tolist()  # type: ignore[operator]


@torch.no_grad()
@pytest.mark.parametrize("method", [EIGHT, PLAIN])
def test_dimensions_that_nothing_writes_go_and_change_nothing(method: Method, batches: list[Tensor]) -> None:
    """The norms are rescaled by exactly the energy that is left: sqrt(32 / 24) times what they were."""
    model, unused = lively_model("llama"), [0, 3, 8, 9, 17, 30, 31, 5]
    model.model.embed_tokens.weight[:, unused] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[unused] = 0
        layer.mlp.down_proj.weight[unused] = 0
    expected, norm_D = model(batches[0]).logits, model.model.layers[0].input_layernorm.weight.clone()
    prune(model, batches, Recipe(method, 0.25, Uniform()))
    kept = [dimension for dimension in range(32) if dimension not in unused]
    torch.testing.assert_close(
        model.model.layers[0].input_layernorm.weight, norm_D[kept] * (32 / 24) ** 0.5, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(model(batches[0]).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_second_cut_counts_the_first(batches: list[Tensor]) -> None:
    model = lively_model("llama")
    prune(model, batches, Recipe(EIGHT, 0.25, Uniform()))
    with pytest.raises(InputError, match="must be at least the current sparsity"):
        prune(model, batches, Recipe(HiddenWidth(multiple=4), 0.1, Uniform()))
    pruned = prune(model, batches, Recipe(EIGHT, 0.5, Uniform()))
    assert (pruned.sparsity_before, pruned.sparsity) == (0.25, 0.5)
    assert [vars(found) for found in structure.structures(model)] == [{"width": 16, "full": 32, "blocks": 3}]


@pytest.mark.parametrize("tied", [True, False])
def test_a_share_of_all_parameters(batches: list[Tensor], *, tied: bool) -> None:
    model = lively_model("llama", tie_word_embeddings=tied)
    before = parameters(model)
    for share in (0.2, 0.4):
        method = HiddenWidth(multiple=4)
        prune(model, batches, Recipe(method, share, Uniform(), budget="parameters"))
        assert abs(1 - parameters(model) / before - share) <= 2 / 32
    with pytest.raises(
        InputError, match=r"must be between 0\.\d+ and 0\.\d+ of all parameters .* for the residual stream"
    ):
        Recipe(HiddenWidth(multiple=4), 0.1, Uniform(), budget="parameters").check(model)


def test_a_narrow_model_is_shrunk_sliced_and_masked(batches: list[Tensor], tmp_path: Path) -> None:
    model = lively_model("llama", num_key_value_heads=4)
    methods: list[Method] = [EIGHT, MLPWidth(multiple=8), HeadGroups()]
    for method in methods:
        prune(model, batches, Recipe(method, 0.5, Uniform()))
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened(batches[0]).logits, model(batches[0]).logits)
    prune(opened, batches, Recipe(Slicing(multiple=4), 0.25, Uniform()))
    prune(model, batches, Recipe(Wanda(), 0.5, Uniform()))
    with pytest.raises(InputError, match="`model` must not have masks for HiddenWidth"):
        Recipe(HiddenWidth(multiple=4), 0.75, Uniform()).check(model)
    with pytest.raises(InputError, match="`model` must not be sliced for HiddenWidth"):
        Recipe(HiddenWidth(multiple=4), 0.75, Uniform()).check(opened)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_weights_on_disk(batches: list[Tensor], tmp_path: Path, *, tied: bool) -> None:
    lively_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "dense")
    in_memory = load_model(str(tmp_path / "dense"))
    mapped = load_model(str(tmp_path / "dense"), on_disk=True)
    prune(in_memory, batches, Recipe(EIGHT, 0.25, Uniform()))
    with offload_folder(mapped, tmp_path / "out"):
        prune(mapped, batches, Recipe(EIGHT, 0.25, Uniform()))
        save(mapped, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(opened(batches[0]).logits, in_memory(batches[0]).logits)


@pytest.mark.parametrize(
    ("method", "family", "sparsity", "message"),
    [
        (
            EIGHT,
            "gpt2",
            0.25,
            r"HiddenWidth cannot shrink the family 'gpt2': it supports .* RMS norms alone, llama, min",
        ),
        (EIGHT, "gemma2", 0.25, "HiddenWidth cannot shrink the family 'gemma2'"),
        (HiddenWidth(multiple=32), "llama", 0.5, r"`HiddenWidth.multiple` must be less than 32, the number of dimens"),
        (EIGHT, "llama", 0.9, r"at most 0\.75 for HiddenWidth, got 0\.9: the stream keeps 8 \(`multiple`\) of 32"),
        (
            HiddenWidth(multiple=6),
            "llama",
            0.25,
            r"`HiddenWidth.multiple` must give widths that the config accepts, got 6: The hidden size \(6\) is not a "
            r"multiple .* Choose a multiple of the number of attention heads",
        ),
    ],
)
def test_what_is_refused(method: Method, family: str, sparsity: float, message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        Recipe(method, sparsity, Uniform()).check(small_model(family))
    assert "\n" not in str(told.value)


def test_a_width_for_each_block_is_refused() -> None:
    with pytest.raises(InputError, match=r"`pruning.allocation` must be Uniform for HiddenWidth, got DLP: .* Slicing"):
        Recipe(EIGHT, 0.25, DLP()).check(small_model())


@pytest.mark.parametrize(
    ("field", "value", "rule"), [("multiple", 0, "at least 1"), ("damping", 0.0, "greater than 0")]
)
def test_settings(field: str, value: float, rule: str) -> None:
    with pytest.raises(InputError, match=rf"`HiddenWidth.{field}` must be {rule}, got {value}"):
        HiddenWidth(**{field: value})  # type: ignore[arg-type]
