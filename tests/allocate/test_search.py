"""Search: its limits, its state, and that it finds what its start has not, on models and on text it has not seen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, OWL, Plan, Search, Uniform
from lit_prune.allocate.base import Level, weighted_mean
from lit_prune.allocate.plan import write_plan
from lit_prune.allocate.search import Loss
from lit_prune.calibration.windows import batches_of
from lit_prune.data.datamodule import TextDataModule
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.families import find_blocks
from lit_prune.models.load import load_model
from lit_prune.pipeline import prune, score
from lit_prune.pruning import Magnitude, Method, MixedNofM, NofM, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.slice import Slicing
from tests.conftest import lively_model, small_model
from tests.search.bowl import Bowl, refine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "`seed` 0, now 1"),
        ({"start": OWL()}, r"`start` Uniform\(\), now OWL\(threshold=5.0, lam=0.08\)"),
        ({"tokens": 8}, "`allocation.tokens` 256, now 8"),
        ({"key": {"weights": "b" * 64, "tokens": "a" * 64}}, "other weights"),
        ({"key": {"weights": "a" * 64, "tokens": "b" * 64}}, "other tokens"),
    ],
)
def test_a_state_that_does_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state, trial = str(tmp_path / "state.json"), Bowl()
    key = {"weights": "a" * 64, "tokens": "a" * 64}
    refine(Bowl(), key, state=state, evaluations=30)
    with pytest.raises(InputError, match=f"`Search.state` must be of the same search, .* of another: {message}"):
        refine(trial, **{"key": key, "state": state} | change)
    assert trial.seen == []


def test_a_state_is_asked_before_the_model_runs(
    batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Search(evaluations=26, state=str(tmp_path / "state.json"))
    score(small_model(), batches, Recipe(Wanda(), 0.5, search))
    monkeypatch.setattr("lit_prune.pipeline.Stream", lambda *_: pytest.fail("the model ran"))
    other = Search(evaluations=26, step=0.2, state=str(tmp_path / "state.json"))
    with pytest.raises(InputError, match="`step` 0.1, now 0.2"):
        score(small_model(), batches, Recipe(Wanda(), 0.5, other))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Search(Search()), "`Search.start` must be an allocation that does not search itself, got Search"),
        (lambda: Search(level="rows"), "`Search.level` must be one of blocks, linears, parts, got 'rows'"),  # type: ignore[arg-type]
        (lambda: Search(loss="mse"), "`Search.loss` must be one of cross_entropy, kl, got 'mse'"),  # type: ignore[arg-type]
        (lambda: Search(step=0.0), r"`Search.step` must be in \(0, 1\), a share of a block, got 0.0"),
        (lambda: Search(windows=0), "`Search.windows` must be at least 1, got 0"),
        (lambda: Search(tokens=0), "`Search.tokens` must be at least 1, got 0"),
        (lambda: Search(minutes=0), "`Search.minutes` must be above 0, or null, got 0"),
        (
            lambda: Search(evaluations=25),
            r"`Search.evaluations` must be at least 26, .* got 25; a sweep over n blocks takes 4 n \+ 10\.",
        ),
        (
            lambda: Search(windows=1000),
            "`Search.windows` must be at most 30 with 400 evaluations, got 1000: .* take 13 .* `evaluations` of at "
            "least 13000",
        ),
        (lambda: Search(evaluations=5, windows=1000), "`Search.evaluations` must be at least 13000, .* got 5"),
        (
            lambda: Search(windows=5).check_windows(4),
            "`Search.windows` must be at most `calibration.num_samples`, 4, got",
        ),
    ],
)
def test_settings_out_of_range(make: Callable[[], Search], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_it_is_its_start_until_it_searches(batches: list[torch.Tensor], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("0: 0.4\n1: 0.5\n2: 0.7\n")
    with pytest.raises(InputError, match="`Plan.path`: the mean of the rates in .* must be .* got 0.533"):
        score(small_model(), batches, Recipe(Wanda(), 0.5, Search(Plan(str(plan)))))
    assert Search(OWL()).needs == OWL.needs
    assert Search().start == DLP()
    assert not Search(Uniform()).is_uniform()


def test_n_of_m_is_refused(batches: list[torch.Tensor]) -> None:
    with pytest.raises(InputError, match=r"`pruning.allocation` must be Uniform for the pattern NofM, .*got Search"):
        prune(small_model(), batches, Recipe(Wanda(NofM()), 0.5, Search(Uniform())))


def test_a_method_without_a_trial_is_refused() -> None:
    class Own(Method):
        propagate = "dense"  # type: ignore[assignment]
        sizes = apply = None  # type: ignore[assignment]

    with pytest.raises(InputError, match="`pruning.allocation` must not be Search for Own, which offers no trial"):
        Recipe(Own(), 0.5, Search())
    Recipe(Own(), 0.5, DLP())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT(), Wanda(MixedNofM(8))], ids=str)
def test_every_method_of_masks(family: str, method: Method, batches: list[torch.Tensor]) -> None:
    model = lively_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe(method, 0.5, Search(Uniform(), evaluations=120, windows=6))
    scored = score(model, batches, recipe)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert 30 <= scored.search["evaluations"] <= 120
    start = score(model, batches, Recipe(method, 0.5, Uniform()))
    coarse = isinstance(method.pattern, MixedNofM)  # type: ignore[attr-defined]
    settled = isinstance(method, SparseGPT) and family == "qwen3_moe"  # no move from equal rates lowers its loss
    assert coarse or settled or scored.rates != start.rates  # by eighths of a block nothing better may be in reach
    assert scored.planned == pytest.approx(start.planned, abs=1e-12)
    better = scored.search["loss_end"] < scored.search["loss_start"]
    assert better == (scored.rates != start.rates)
    pruned = prune(model, batches, recipe)
    assert pruned.rates == scored.rates
    assert pruned.search == scored.search
    assert pruned.achieved == pytest.approx(scored.rates, abs=2e-3)
    if coarse:
        assert all(rate * 8 == pytest.approx(round(rate * 8)) for rate in scored.rates)


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize(("family", "step"), [("llama", 0.25), ("phi", 0.1)])
def test_slices(family: str, step: float, slice_head: bool, batches: list[torch.Tensor]) -> None:
    model = lively_model(family)
    method = Slicing(multiple=2, slice_head=slice_head)
    loss: Loss = "cross_entropy" if slice_head else "kl"
    recipe = Recipe(method, 0.25, Search(Uniform(), evaluations=200, windows=6, step=step, loss=loss))
    pruned = prune(model, batches, recipe)
    assert pruned.search["loss_end"] < pruned.search["loss_start"]
    widths = model.config.slice_sizes[:3]
    assert widths != [24, 24, 24]
    assert sum(widths) == 72
    assert all(width % 2 == 0 for width in widths)
    assert pruned.rates == pytest.approx([1 - width / 32 for width in widths])


def test_padding_does_not_count(batches: list[torch.Tensor]) -> None:
    ids, mask = batches[0].clone(), torch.ones_like(batches[0])
    mask[:, 10:] = 0
    recipe = Recipe(Wanda(), 0.5, Search(evaluations=26))
    cut = score(small_model(), [ids[:, :10]], recipe)
    padded = score(small_model(), [{"input_ids": ids, "attention_mask": mask}], recipe)
    assert padded.search["loss_start"] == pytest.approx(cut.search["loss_start"], rel=1e-5)


def test_a_model_that_is_broken(batches: list[torch.Tensor]) -> None:
    model = small_model(tie_word_embeddings=False)
    model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="the loss under the rates of `Search.start` is NaN or infinity"):
        score(model, batches, Recipe(Magnitude(), 0.5, Search(Uniform())))


def test_searched_rates_are_better_on_text_that_was_not_searched_on() -> None:
    data = TextDataModule("embedded", seq_length=128, batch_size=8, val_windows=16)
    windows = batches_of(data.calibration_windows(8, 128, seed=0), 1)

    def perplexity(recipe: Recipe) -> tuple[float, PreTrainedModel]:
        model = load_model("embedded", "float32")
        prune(model, windows, recipe)
        return measure(model, data.val_dataloader(), "val").perplexity, model

    start, _ = perplexity(Recipe(Wanda(), 0.6, DLP()))
    found, model = perplexity(Recipe(Wanda(), 0.6, Search(DLP(), evaluations=120)))
    assert found < 0.9 * start
    assert json.dumps(model.config.lit_prune["recipe"])


def test_windows_are_drawn_by_the_sweep() -> None:
    trial = Bowl()
    refine(trial)
    assert {window for _, window in trial.seen} == {0, 1, 2, 3}


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
@pytest.mark.parametrize("method", [Magnitude(), SparseGPT()], ids=str)
def test_linears_get_rates_of_their_own(method: Method, loss: str, batches: list[torch.Tensor], tmp_path: Path) -> None:
    model, state = lively_model("llama"), str(tmp_path / "state.json")
    search = Search(Uniform(), evaluations=200, windows=4, level="linears", loss=loss, state=state)  # type: ignore[arg-type]
    pruned = prune(model, batches, Recipe(method, 0.5, search))
    assert pruned.search["loss_end"] < pruned.search["loss_start"]
    assert pruned.linears is not None
    linears = [block.linears for block in find_blocks(model)]
    for rates, found, mean in zip(pruned.linears, linears, pruned.rates, strict=True):
        sizes = [linear.size for linear in found.values()]
        assert list(rates.values()) == pytest.approx([linear.pruned / linear.size for linear in found.values()])
        assert mean == pytest.approx(weighted_mean(list(rates.values()), sizes))
    assert len({rate for rates in pruned.linears for rate in rates.values()}) > 3
    zero = sum(linear.pruned for found in linears for linear in found.values())
    assert zero == sum(linear.size for found in linears for linear in found.values()) / 2  # the budget, exactly
    assert (
        prune(lively_model("llama"), batches, Recipe(method, 0.5, search)).linears == pruned.linears
    )  # from the state


def test_linears_of_a_model_that_is_pruned_already_keep_their_zeros(batches: list[torch.Tensor]) -> None:
    model = lively_model("llama")
    prune(model, batches, Recipe(Magnitude(), 0.4, Uniform(), targets=["q_proj"]))
    before = [linear.pruned for block in find_blocks(model) for linear in block.linears.values()]
    search = Search(Uniform(), evaluations=60, level="linears")
    pruned = prune(model, batches, Recipe(Magnitude(), 0.3, search))
    after = [linear.pruned for block in find_blocks(model) for linear in block.linears.values()]
    assert all(now >= then for now, then in zip(after, before, strict=True))
    assert pruned.sparsity == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("level", ["blocks", "linears"])
def test_the_divergence_is_that_from_the_model_with_its_zeros(level: Level, batches: list[torch.Tensor]) -> None:
    """One linear has zeros already, so that no block can be at a rate of 0."""
    model = lively_model("llama")
    first = find_blocks(model)[0].linears["self_attn.q_proj"]
    first.write(torch.where(torch.arange(first.weight_OI.numel()).view_as(first.weight_OI) < 40, 0, first.weight_OI))
    recipe = Recipe(Wanda(), 0.01, Search(Uniform(), evaluations=26, level=level, loss="kl"))
    assert 0 < score(model, batches, recipe).search["loss_start"] < 1e-3  # 1% of the weights is little


def test_a_search_goes_on_from_a_plan_of_linears(batches: list[torch.Tensor], tmp_path: Path) -> None:
    search = Search(Uniform(), evaluations=60, level="linears")
    first = score(lively_model("llama"), batches, Recipe(Wanda(), 0.5, search))
    write_plan(tmp_path / "plan.yaml", first.rates, first.scores, "", first.linears)
    again = Search(Plan(str(tmp_path / "plan.yaml")), evaluations=60, level="linears", seed=1)
    second = score(lively_model("llama"), batches, Recipe(Wanda(), 0.5, again))
    assert second.planned == pytest.approx(0.5, abs=1e-5)
    assert first.linears is not None
    assert second.linears is not None
    assert second.linears != first.linears
    cut = prune(lively_model("llama"), batches, Recipe(Wanda(), 0.5, Plan(str(tmp_path / "plan.yaml"))))
    measured = Search(Plan(str(tmp_path / "plan.yaml")), evaluations=26, minutes=1e-9, level="linears")
    stopped = score(lively_model("llama"), batches, Recipe(Wanda(), 0.5, measured))
    assert stopped.linears == cut.linears  # no sweep was made: these are the rates that it starts from


def test_candidates_from_a_plan_of_linears_are_made_behind_its_rates(
    batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = dict.fromkeys(find_blocks(lively_model("llama"))[0].linears, 0.1)
    sizes = {name: linear.size for name, linear in find_blocks(lively_model("llama"))[0].linears.items()}
    named = rates | {"mlp.down_proj": 0.9}
    mean = weighted_mean(list(named.values()), [sizes[name] for name in named])
    write_plan(tmp_path / "plan.yaml", [mean] * 3, [1.0] * 3, "", [named] * 3)
    seen: list[Any] = []
    kept = SparseGPT.trial_statistics

    def watched(self: SparseGPT, model: Any, blocks: Any, **settings: Any) -> Any:
        seen.extend(block.rates for block in blocks)
        return kept(self, model, blocks, **settings)

    monkeypatch.setattr(SparseGPT, "trial_statistics", watched)
    search = Search(Plan(str(tmp_path / "plan.yaml")), evaluations=26, level="linears")
    score(lively_model("llama"), batches, Recipe(SparseGPT(), float(f"{mean:.6f}"), search))
    assert seen == [pytest.approx(named)] * 3


def test_a_start_with_rates_of_linears_is_refused_for_blocks(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("0: {rate: 0.5, q_proj: 0.5}\n")
    with pytest.raises(InputError, match="`Search.start` must have one rate per block, got rates of linears or parts"):
        Search(Plan(str(tmp_path / "plan.yaml")))
