"""Cuts that remove units from the blocks of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.allocate import DLP, LayerRedundancy, Search, Uniform
from lit_prune.allocate.base import weighted_mean
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.pruning import Method, Wanda
from lit_prune.recipe import Recipe
from lit_prune.search.trial import Trial
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from lit_prune.slice import Slicing
from tests.conftest import FAMILIES, lively_model, multimodal_model, small_model
from tests.shrink.given import Given

METHODS = {
    "width": MLPWidth(multiple=8),
    "plain width": MLPWidth(multiple=8, compensate=False),
    "groups": HeadGroups(),
    "plain groups": HeadGroups(compensate=False),
}
SUPPORTED = {
    "width": sorted({*FAMILIES} - {"mixtral", "qwen3_moe"}),
    "groups": ["gemma2", "gemma3_text", "llama", "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe"],
}
CASES = [(name, family) for name in METHODS for family in SUPPORTED[name.rpartition(" ")[2]]]


def four_groups(family: str = "llama", **fields: Any) -> PreTrainedModel:
    return lively_model(family, num_key_value_heads=4, **fields)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_equal_sizes_leave_the_familys_own_class(name: str, family: str, batches: list[Tensor], tmp_path: Path) -> None:
    model = four_groups(family)
    kind, parameters = type(model), model.num_parameters()
    pruned = prune(model, batches, Recipe(METHODS[name], 0.5, Uniform()))
    assert pruned.achieved == [0.5] * 3
    assert model.num_parameters() < parameters
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is kind
    assert [file.name for file in tmp_path.glob("*.py")] == []
    assert torch.equal(opened(batches[0]).logits, model(batches[0]).logits)
    assert "auto_map" not in opened.config.to_dict()


@pytest.mark.parametrize("name", ["width", "groups"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"])
def test_sizes_of_every_block(name: str, family: str, batches: list[Tensor], tmp_path: Path) -> None:
    model = four_groups(family)
    pruned = prune(model, batches, Recipe(METHODS[name], 0.5, Given((0.25, 0.5, 0.75))))
    assert pruned.achieved == pytest.approx([0.25, 0.5, 0.75] if name == "groups" else [1 / 6, 1 / 2, 5 / 6])
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened(batches[0]).logits, model(batches[0]).logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert opened.generate(batches[0], **settings).tolist() == model.generate(batches[0], **settings).tolist()  # type: ignore[operator]


@torch.no_grad()
@pytest.mark.parametrize("name", ["width", "groups"])
def test_compensation_lowers_the_error_of_the_output(name: str, batches: list[Tensor]) -> None:
    expected = four_groups()(batches[0]).logits
    errors = []
    for method in (METHODS[name], METHODS[f"plain {name}"]):
        model = four_groups()
        prune(model, batches, Recipe(method, 0.5, Uniform()))
        errors.append(float((model(batches[0]).logits - expected).square().mean()))
    assert errors[0] < 0.9 * errors[1]


def test_a_bias_makes_up_for_the_mean(batches: list[Tensor]) -> None:
    """Inputs that are the same in all tokens are of no use beside a bias: it takes over what they gave."""
    model = lively_model("phi")
    for layer in model.model.layers:
        layer.mlp.fc1.weight.data[:24] = 0
        layer.mlp.fc1.bias.data[:24] = 1 + torch.arange(24.0)
    expected = model(batches[0]).logits
    prune(model, batches, Recipe(MLPWidth(multiple=8, damping=1e-5), 0.5, Uniform()))
    torch.testing.assert_close(model(batches[0]).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_second_cut_counts_the_first(batches: list[Tensor]) -> None:
    model = four_groups()
    prune(model, batches, Recipe(MLPWidth(multiple=8), 1 / 3, Uniform()))
    with pytest.raises(InputError, match="must be at least the current sparsity"):
        prune(model, batches, Recipe(MLPWidth(multiple=8), 0.1, Uniform()))
    pruned = prune(model, batches, Recipe(MLPWidth(multiple=8), 0.5, LayerRedundancy(base=0.1)))
    assert pruned.sparsity == pytest.approx(0.5)
    assert pruned.sparsity_before == pytest.approx(1 / 3)
    assert min(pruned.achieved) >= 1 / 3 - 1e-9
    assert pruned.sizes == [48] * 3
    (recorded,) = structure.structures(model)
    assert recorded.full == [48] * 3  # type: ignore[attr-defined]


def test_a_second_cut_in_larger_steps_meets_its_size(batches: list[Tensor]) -> None:
    """What a block has lost before is not made up for by the others."""
    model = lively_model("llama", num_hidden_layers=6)
    first = Given((5 / 6, 5 / 6, 5 / 6, 1 / 48, 1 / 48, 2 / 48))
    prune(model, batches, Recipe(MLPWidth(multiple=2, rounds=1), weighted_mean(first.given, [1] * 6), first))
    target = parameters(model) - 16 * 3 * 32
    recipe = Recipe(MLPWidth(multiple=16, rounds=1), target_parameters=target, allocation=Uniform())
    pruned = prune(model, batches, recipe)
    assert model.config.block_sizes["intermediate_size"][:3] == [8, 8, 8]
    assert abs(parameters(model) - target) <= 16 / 2 * 3 * 32
    assert pruned.rates == pytest.approx(pruned.achieved)


@pytest.mark.parametrize("sparsity", [5 / 12, 6 / 12])
def test_a_second_cut_may_leave_blocks_that_differ(sparsity: float, batches: list[Tensor]) -> None:
    """The config of Llama has no 3 of 4 groups, but blocks that differ have a list of their own."""
    model = four_groups()
    prune(model, batches, Recipe(HeadGroups(), 1 / 3, Given((0.0, 0.25, 0.75))))
    recipe = Recipe(HeadGroups(), sparsity, Uniform())
    recipe.check(model)
    assert prune(model, batches, recipe).sparsity == pytest.approx(sparsity)
    assert model.config.block_sizes["num_key_value_heads"] == [3, 3 if sparsity < 0.5 else 2, 1]


def test_what_is_gone_is_refused_but_for_half_a_multiple(batches: list[Tensor]) -> None:
    """Half of 48 channels are gone: half a multiple of 8 of the 48 is 0.083, of the 24 that are left 0.167."""
    model = four_groups()
    prune(model, batches, Recipe(MLPWidth(multiple=8), 0.5, Uniform()))
    Recipe(MLPWidth(multiple=8), 0.45, Uniform()).check(model)
    for sparsity in (0.4, 0.0):
        with pytest.raises(InputError, match="must be at least the current sparsity, 0.5"):
            Recipe(MLPWidth(multiple=8), sparsity, Uniform()).check(model)


@pytest.mark.parametrize("method", [MLPWidth(multiple=1, rounds=1), HeadGroups()], ids=str)
@pytest.mark.parametrize("family", ["mistral", "phi"])
def test_a_share_of_all_parameters(family: str, method: Method, batches: list[Tensor]) -> None:
    model = four_groups(family, tie_word_embeddings=family == "mistral")
    before = parameters(model)
    blocks, shares = find_blocks(model), (0.05, 0.2)
    unit = (before - parameters(_with_one_unit_less(method, family, batches))) / 3
    for share in shares:
        prune(model, batches, Recipe(method, share, Uniform(), budget="parameters"))
        assert abs(1 - parameters(model) / before - share) <= len(blocks) * unit / 2 / before + 1e-9


def _with_one_unit_less(method: Method, family: str, batches: list[Tensor]) -> PreTrainedModel:
    model = four_groups(family, tie_word_embeddings=family == "mistral")
    units = method.sizes(model, find_blocks(model))[0]
    prune(model, batches, Recipe(method, 1 / units, Uniform()))
    return model


@pytest.mark.parametrize("share", [0.6, 0.97])  # the second is more than a block can lose of its channels, too
def test_a_share_that_channels_do_not_have(share: float) -> None:
    message = r"must be between 0 and 0\.\d+ of all parameters .* `multiple` and earlier cuts allow for the channels"
    with pytest.raises(InputError, match=message):
        Recipe(MLPWidth(multiple=8), share, Uniform(), budget="parameters").check(small_model())


def test_a_shrunk_model_is_masked_and_sliced(batches: list[Tensor]) -> None:
    model = four_groups()
    prune(model, batches, Recipe(MLPWidth(multiple=8), 0.5, LayerRedundancy(base=0.1)))
    assert prune(model, batches, Recipe(Wanda(), 0.5, DLP())).sparsity == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(InputError, match="`model` must not have masks for MLPWidth"):
        prune(model, batches, Recipe(MLPWidth(multiple=8), 0.7, Uniform()))
    equal = four_groups()
    prune(equal, batches, Recipe(MLPWidth(multiple=8), 0.5, Uniform()))
    prune(equal, batches, Recipe(Slicing(multiple=4), 0.25, Uniform()))
    assert type(equal).__name__ == "SlicedLlamaForCausalLM"
    with pytest.raises(InputError, match="`model` must not be sliced for HeadGroups"):
        prune(equal, batches, Recipe(HeadGroups(), 0.5, Uniform()))


def test_slicing_refuses_blocks_of_different_sizes(batches: list[Tensor]) -> None:
    model = four_groups()
    prune(model, batches, Recipe(MLPWidth(multiple=8), 0.5, LayerRedundancy(base=0.1)))
    with pytest.raises(InputError, match="blocks of different sizes"):
        prune(model, batches, Recipe(Slicing(multiple=4), 0.25, Uniform()))


@pytest.mark.parametrize("name", ["width", "groups"])
def test_a_search_finds_no_worse_sizes(name: str, batches: list[Tensor]) -> None:
    search = Search(evaluations=20, windows=1, step=0.25)
    model = four_groups()
    pruned = prune(model, batches, Recipe(METHODS[name], 0.5, search))
    assert pruned.sparsity == pytest.approx(0.5)
    assert pruned.search["loss_end"] <= pruned.search["loss_start"]


@pytest.mark.parametrize("name", METHODS)
def test_a_trial_computes_what_a_cut_of_one_block_leaves(name: str, batches: list[Tensor]) -> None:
    """With a single shrunk block, the statistics of the unpruned model are those behind the shrunk ones."""
    model, cut = four_groups(), four_groups()
    recipe = Recipe(METHODS[name], 1 / 6, Search())
    seen: list[Trial] = []
    statistics = dense_statistics(model, batches)
    rates = [0.5, 0.0, 0.0]
    dicts = [{"input_ids": batch} for batch in batches]
    arguments: dict[str, Any] = {"statistics": statistics, "device": torch.device("cpu"), "batches": dicts}
    with recipe.method.trial(model, find_blocks(model), **arguments) as trial, torch.no_grad():
        seen.append(trial)
        trial.take(rates)
        tried = model(batches[0]).logits
    prune(cut, batches, Recipe(METHODS[name], 1 / 6, Given(tuple(rates))))
    torch.testing.assert_close(tried, cut(batches[0]).logits.detach(), rtol=1e-3, atol=1e-4)
    assert torch.equal(model(batches[0]).logits, four_groups()(batches[0]).logits)


def dense_statistics(model: PreTrainedModel, batches: list[Tensor]) -> Any:
    from lit_prune.calibration.statistics import GRAM
    from lit_prune.calibration.stream import Stream, observe

    blocks = find_blocks(model)
    stream = Stream(model, blocks, [{"input_ids": batch} for batch in batches], torch.device("cpu"))
    return [observe(stream, block, frozenset({GRAM})) for block in blocks]


@pytest.mark.parametrize(
    ("method", "family", "sparsity", "message"),
    [
        (MLPWidth(multiple=8), "llama", 0.9, r"at most 0\.8333 for MLPWidth, got 0\.9: every block keeps 8"),
        (HeadGroups(), "llama", 0.6, r"at most 0\.5 for HeadGroups, got 0\.6: every block keeps 1"),
        (MLPWidth(multiple=1000), "llama", 0.5, r"`MLPWidth.multiple` must be less than 48, the number of channels of"),
        (
            HeadGroups(multiple=2),
            "llama",
            0.5,
            r"`HeadGroups.multiple` must be less than 2, the number of key/value gr",
        ),
        (MLPWidth(), "mixtral", 0.5, r"MLPWidth cannot shrink the family 'mixtral': its MLPs are mixtures of experts"),
        (HeadGroups(), "gpt2", 0.5, r"HeadGroups cannot shrink the family 'gpt2': its config has no field for the"),
        (HeadGroups(), "opt", 0.5, r"HeadGroups cannot shrink the family 'opt': its config has no place for"),
    ],
)
def test_what_is_refused(method: Method, family: str, sparsity: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(method, sparsity, Uniform()).check(small_model(family))


def test_numbers_that_the_config_does_not_accept() -> None:
    """Three heads do not divide the 32 dimensions of the stream: nothing could open the folder."""
    message = (
        r"must leave a number of key/value groups that the config accepts, got 3 of 4: The hidden size \(32\) is not a "
        r"multiple of the number of attention heads \(3\)\. It accepts every multiple of 2: set `multiple` of Head"
    )
    for method in (HeadGroups(), Shrink([HeadGroups()])):
        with pytest.raises(InputError, match=message):
            Recipe(method, 0.25, Uniform()).check(four_groups())
    Recipe(HeadGroups(multiple=2), 0.25, Uniform()).check(four_groups())
    Recipe(HeadGroups(), 0.25, Uniform()).check(four_groups("qwen3"))
    Recipe(HeadGroups(), 0.25, DLP()).check(four_groups())  # blocks of different sizes keep the number of the config


@pytest.mark.parametrize("method", [HeadGroups(), Shrink([MLPWidth(multiple=8), HeadGroups()])], ids=str)
def test_equal_numbers_that_the_config_does_not_accept_are_kept_by_block(
    method: Method, batches: list[Tensor], tmp_path: Path
) -> None:
    """A plan may leave three of four heads in every block, which the config of Llama cannot have for all."""
    model = four_groups()
    prune(model, batches, Recipe(method, 0.25, Given((0.25, 0.25, 0.25))))
    assert type(model).__name__ == "ShrunkLlamaForCausalLM"
    sizes = {"num_attention_heads": [3, 3, 3], "num_key_value_heads": [3, 3, 3]}
    assert {name: model.config.block_sizes[name] for name in sizes} == sizes
    assert model.config.num_attention_heads == 4
    assert structure.structures(model)[-1].describe(model).loading.startswith("import lit_prune")
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened(batches[0]).logits, model(batches[0]).logits)
    prune(model, batches, Recipe(HeadGroups(), 0.5, Uniform()))
    assert model.config.num_attention_heads == 2
    assert "num_attention_heads" not in (getattr(model.config, "block_sizes", None) or {})


def test_different_sizes_need_a_class() -> None:
    with pytest.raises(InputError, match="`pruning.allocation` must be Uniform for MLPWidth and the family 'falcon'"):
        Recipe(MLPWidth(multiple=8), 0.5, DLP()).check(small_model("falcon"))
    Recipe(MLPWidth(multiple=8), 0.5, Uniform()).check(small_model("falcon"))
    with pytest.raises(InputError, match="`pruning.allocation` must be Uniform for MLPWidth and the family 'gemma3'"):
        Recipe(MLPWidth(multiple=8), 0.5, DLP()).check(multimodal_model())


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("multiple", 0, "at least 1"), ("rounds", 0, "at least 1"), ("damping", 0.0, "greater than 0")],
)
def test_settings(field: str, value: float, rule: str) -> None:
    with pytest.raises(InputError, match=rf"`MLPWidth.{field}` must be {rule}, got {value}"):
        MLPWidth(**{field: value})  # type: ignore[arg-type]
