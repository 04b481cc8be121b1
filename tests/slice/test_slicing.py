"""The function stays what it was, the widths are those asked for, and what cannot be sliced is refused."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, LayerRedundancy, Plan, Search, Uniform, write_plan
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.models import structure
from lit_prune.models.remote_code.modeling_sliced import SLICED, SlicedCausalLM, SlicedNorm
from lit_prune.pipeline import prune, score
from lit_prune.pruning import Wanda
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA
from lit_prune.slice import Slicing
from lit_prune.slice.slices import Slices
from tests.conftest import lively_model, small_model

FAMILIES = sorted(SLICED)


def generated(model: PreTrainedModel, ids: torch.Tensor, *, use_cache: bool) -> list[int]:
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=use_cache, eos_token_id=None
    ).tolist()  # type: ignore[operator]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slice_head", [False, True])
def test_without_a_slice_the_function_is_the_same(family: str, slice_head: bool, batches: list[torch.Tensor]) -> None:
    model, dense = lively_model(family), lively_model(family)
    prune(model, batches, Recipe(Slicing(slice_head=slice_head), 0.0, Uniform()))
    assert isinstance(model, SlicedCausalLM)
    for batch in batches:
        expected = dense(batch).logits
        assert (model(batch).logits - expected).abs().max() / expected.abs().max() < 1e-4
    for use_cache in (True, False):
        texts = generated(dense, batches[0], use_cache=use_cache)
        assert generated(model, batches[0], use_cache=use_cache) == texts
        assert len({tuple(text[-12:]) for text in texts}) == 2  # the test would not see much in equal tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_widths_are_those_asked_for(family: str, batches: list[torch.Tensor]) -> None:
    model = small_model(family)
    pruned = prune(model, batches, Recipe(Slicing(multiple=4), 0.25, LayerRedundancy(base=0.1)))
    sizes = model.config.slice_sizes
    assert sizes[-1] == 32
    assert sum(sizes[:-1]) == 3 * 24
    assert pruned.rates == pruned.achieved == [1 - size / 32 for size in sizes[:-1]]
    assert pruned.sparsity == pytest.approx(0.25)
    layout = type(model).layer_class.layout
    for layer, (width, following) in zip(model.get_submodule(layout.layers), pairwise(sizes), strict=True):
        for step in layout.steps:
            out = following if step is layout.steps[-1] else width
            assert getattr(layer, step.shortcut).shape == (width, out)
            assert all(layer.get_submodule(name).weight.shape[1] == width for name in step.readers)
            assert all(layer.get_submodule(name).weight.shape[0] == out for name in step.writers)
    assert all(model.get_submodule(name).weight.shape[1] == sizes[0] for name in layout.embeddings)
    assert torch.isfinite(model(batches[0]).logits).all()


def test_a_look_tells_the_widths_and_a_plan_of_them_gives_the_same(
    model: PreTrainedModel, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    scored = score(model, batches, Recipe(Slicing(multiple=4), 0.3, DLP()))
    assert scored.planned == pytest.approx(7 / 24)  # 0.3 of 3 * 32 dimensions is 7.2 multiples
    write_plan(tmp_path / "plan.yaml", scored.rates, scored.scores, "")
    pruned = prune(model, batches, Recipe(Slicing(multiple=4), scored.planned, Plan(str(tmp_path / "plan.yaml"))))
    assert pruned.achieved == pytest.approx(scored.rates)


def test_the_stream_of_the_walk_is_that_of_the_sliced_model(batches: list[torch.Tensor]) -> None:
    """Each block's axes are those of what the sliced blocks before it give: its mean squares fall from axis to axis."""
    model = lively_model("llama")
    prune(model, batches, Recipe(Slicing(), 0.25, Uniform()))
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
    model(torch.cat(batches))
    for x_PK in seen:
        gram_KK = (x_PK.T @ x_PK).double()
        squares_K = gram_KK.diagonal()
        assert (squares_K[:-1] >= squares_K[1:] * (1 - 1e-4)).all()
        off = gram_KK - squares_K.diag()
        assert off.abs().max() < 1e-3 * squares_K.max()


def test_a_slice_loses_least_where_the_stream_says_nothing(batches: list[torch.Tensor]) -> None:
    """A stream that lies in 24 of 32 dimensions is sliced by a quarter without any loss."""
    model = lively_model("llama", tie_word_embeddings=False)
    axes = torch.linalg.qr(torch.randn(32, 24, generator=torch.Generator().manual_seed(0))).Q
    onto = axes @ axes.T
    writers = [model.model.embed_tokens.weight.data.T]
    for layer in model.model.layers:
        writers += [layer.self_attn.o_proj.weight.data, layer.mlp.down_proj.weight.data]
    for weight_DI in writers:
        weight_DI.copy_(onto @ weight_DI)
    expected = model(batches[0]).logits
    prune(model, batches, Recipe(Slicing(), 0.25, Uniform()))
    assert model.config.slice_sizes == [24, 24, 24, 32]
    assert (model(batches[0]).logits - expected).abs().max() / expected.abs().max() < 1e-4


def test_more_slicing_is_further_from_the_dense_model(batches: list[torch.Tensor]) -> None:
    expected = lively_model("llama")(batches[0]).logits
    distances = []
    for mean in (0.0, 0.125, 0.25, 0.5):
        model = lively_model("llama")
        prune(model, batches, Recipe(Slicing(multiple=4), mean, Uniform()))
        distances.append((model(batches[0]).logits - expected).square().mean().item())
    assert distances == sorted(distances)


def test_the_same_text_gives_the_same_model(batches: list[torch.Tensor]) -> None:
    models = [small_model(), small_model()]
    for model in models:
        prune(model, batches, Recipe(Slicing(), 0.25, DLP()))
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_padding_has_no_say(batches: list[torch.Tensor]) -> None:
    ids = batches[0].clone()
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    models = []
    for filler in (3, 7):
        ids[:, 12:] = filler
        model = small_model()
        prune(model, [{"input_ids": ids.clone(), "attention_mask": mask}], Recipe(Slicing(), 0.25, Uniform()))
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16(batches: list[torch.Tensor]) -> None:
    model, dense = lively_model("llama").bfloat16(), lively_model("llama").bfloat16()
    prune(model, batches, Recipe(Slicing(), 0.0, Uniform()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected, found = dense(batches[0]).logits.float(), model(batches[0]).logits.float()
    assert (found - expected).norm() / expected.norm() < 0.05


def test_the_norm_keeps_the_width_and_the_eps_of_the_dense_model(batches: list[torch.Tensor]) -> None:
    model = small_model(rms_norm_eps=0.5)
    prune(model, batches, Recipe(Slicing(), 0.25, Uniform()))
    norms = [module for module in model.modules() if isinstance(module, SlicedNorm)]
    assert len(norms) == 7
    assert {(norm.hidden_size, norm.eps) for norm in norms} == {(32, 0.5)}
    torch.testing.assert_close(SlicedNorm(4, 0.0)(torch.tensor([3.0, 4.0])), torch.tensor([1.2, 1.6]))


def test_a_tied_head_becomes_untied_and_the_growth_is_told(
    batches: list[torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model()
    before = parameters(model)
    prune(model, batches, Recipe(Slicing(), 0.0, Uniform()))
    told = " ".join(capsys.readouterr().err.split())
    assert "The head was tied to the embedding; a sliced model has a head of its own, 2,048 parameters more." in told
    assert f"Warning: slicing made the model bigger, from {before:,} to {parameters(model):,} parameters" in told
    assert structure.structures(model) == (Slices([32, 32, 32, 32], untied_head=True),)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    untied = small_model(tie_word_embeddings=False)
    prune(untied, batches, Recipe(Slicing(), 0.5, Uniform()))
    told = capsys.readouterr().err
    assert "tied" not in told
    assert "bigger" not in told
    assert structure.structures(untied) == (Slices([16, 16, 16, 32], untied_head=False),)


def test_masks_after_slices(batches: list[torch.Tensor]) -> None:
    model = small_model()
    prune(model, batches, Recipe(Slicing(), 0.25, Uniform()))
    masked = prune(model, batches, Recipe(Wanda(), 0.5, Uniform()))
    assert masked.sparsity == pytest.approx(0.5, abs=1e-3)
    assert model.config.slice_sizes == [24, 24, 24, 32]
    assert structure.masked(model)


def refused(model: PreTrainedModel, batches: list[torch.Tensor], recipe: Recipe, message: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        prune(model, batches, recipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            Recipe(Slicing(), 0.9, Uniform()),
            r"`pruning.sparsity` must be at most 0.75 for Slicing, got 0.9: every block",
        ),
        (
            Recipe(Slicing(), 0.25, LayerRedundancy(base=0.3)),
            r"`LayerRedundancy.base` must be at most the mean sparsity of the blocks",
        ),
        (
            Recipe(Slicing(multiple=5), 0.25, Uniform()),
            r"`Slicing.multiple` must divide the model's width of 32 and be less, got 5",
        ),
        (Recipe(Slicing(), 0.25, Uniform(), min_rate=0.3), r"`pruning.sparsity` must be between 0.3 and 0.75"),
    ],
)
def test_slices_that_cannot_be(
    model: PreTrainedModel, batches: list[torch.Tensor], recipe: Recipe, message: str
) -> None:
    refused(model, batches, recipe, message)


def test_a_search_by_the_divergence_is_refused_before_any_work(
    model: PreTrainedModel, batches: list[torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(Slicing(slice_head=True), 0.25, Search())
    refused(model, batches, recipe, "`Search.loss` must be cross_entropy for a method that slices the head, got kl")
    assert capsys.readouterr().err == ""


def test_settings_out_of_range() -> None:
    with pytest.raises(InputError, match=r"`Slicing.multiple` must be at least 1, got 0"):
        Slicing(multiple=0)
    with pytest.raises(InputError, match=r"`pruning.targets` and `pruning.ignore` must be left out for Slicing"):
        Recipe(Slicing(), targets=["q_proj"])


def test_what_is_refused_is_left_as_it_was(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    recipe = Recipe(Slicing(), 0.25, Uniform())
    refused(small_model("gpt2"), batches, recipe, "Slicing cannot slice the family 'gpt2'")
    LoRA().attach(model)
    refused(model, batches, recipe, "must be pruned before adapters are attached")
