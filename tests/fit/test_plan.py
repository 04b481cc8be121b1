"""The plan of a fit, and settings that exclude each other, without a Trainer."""

from pathlib import Path
from typing import Any

import pytest

from lit_prune.allocate import DLP, Plan, Search, Uniform, write_plan
from lit_prune.calibration.windows import Calibration
from lit_prune.checkpointing.settings import check_settings
from lit_prune.errors import InputError
from lit_prune.fit.plan import FitPlan
from lit_prune.models import structure
from lit_prune.pruning import NofM, Wanda
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct
from lit_prune.recover import LoRA, MaskedLoRA, QLoRA
from lit_prune.schedule import Cut
from lit_prune.shrink import MLPWidth
from tests.conftest import small_model

ONE, TWO = (Cut(0, 0.5),), (Cut(0, 0.25), Cut(4, 0.5))


def course(cuts: tuple[Cut, ...] = ONE, recipe: Recipe | None = Recipe(Wanda(), 0.5, DLP()), **fields: Any) -> FitPlan:  # noqa: B008 (frozen)
    parts = dict.fromkeys(("before", "recovery", "distillation", "statistics", "blocks", "keep_zeros"))
    return FitPlan(recipe=recipe, cuts=cuts, **parts | {"calibration": Calibration()} | fields)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": None, "cuts": (), "before": LoRA()}, "`pruning.before` must be null without `pruning.method`"),
        ({"before": LoRA()}, "`pruning.before` must be null if the first cut comes at step 0"),
        ({"cuts": (Cut(2, 0.5),), "before": QLoRA()}, "`pruning.before` must leave the weights in full precision"),
        ({"cuts": TWO, "recovery": QLoRA()}, "`pruning.recovery` must leave the weights in full precision"),
        (
            {"cuts": TWO, "recovery": LoRA()},
            "`pruning.recovery` must keep zeros when its adapter is merged",
        ),
        (
            {"cuts": TWO, "recipe": Recipe(reconstruction=Reconstruct(state="blocks")), "recovery": MaskedLoRA()},
            "`pruning.reconstruction.state` must be null for 2 cuts, since it holds the blocks of one, got blocks",
        ),
        ({"cuts": TWO, "recipe": Recipe(Wanda(NofM(2, 4)), 0.5, DLP())}, "`pruning.at_step` must be one step for"),
        (
            {"recipe": Recipe(Wanda(), 0.5, Search(windows=5)), "calibration": Calibration(4)},
            "`Search.windows` must be at most `calibration.num_samples`, 4, got 5",
        ),
        ({"cuts": (Cut(3, 0.5),), "statistics": object()}, "`pruning.statistics` must be null for cuts after step 0"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        course(**given)


def test_a_plan_has_the_rates_of_one_cut(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    write_plan(plan, [0.5], [1.0], "DLP")
    with pytest.raises(InputError, match="`pruning.allocation` must not be a Plan for 2 cuts"):
        course(TWO, Recipe(Wanda(), 0.5, Plan(str(plan))))


def test_what_it_is_asked() -> None:
    made = course(TWO, recovery=MaskedLoRA())
    assert (made.steps, made.last_step, made.idle) == ((0, 4), 4, False)
    assert made.student().recovery == MaskedLoRA()
    nothing = course((), None)
    assert (nothing.steps, nothing.last_step, nothing.idle) == ((), 0, True)
    with pytest.raises(InputError, match="`pruning.distillation` must be null without `pruning.method`"):
        nothing.student()


def test_a_cut_must_come_before_the_end() -> None:
    made = course(TWO)
    made.check_end(5)
    with pytest.raises(InputError, match="`pruning.at_step` must be below the number of optimizer steps, 4 .*, got 4"):
        made.check_end(4)
    course().check_end(0)


def test_settings_bear_the_users_names_and_one_of_a_kind_stands_alone() -> None:
    settings = course(recovery=LoRA(r=4)).settings()
    assert (settings["pruning.at_step"], settings["pruning.sparsity"]) == (0, 0.5)
    assert settings["pruning.recovery"] == repr(LoRA(r=4))
    assert course(TWO).settings()["pruning.at_step"] == [0, 4]
    assert course((), None).settings()["pruning.method"] is None


def test_a_reconstruction_needs_two_batches() -> None:
    recipe = Recipe(reconstruction=Reconstruct())
    with pytest.raises(InputError, match="`pruning.reconstruction` must have at least two calibration batches"):
        course(recipe=recipe, calibration=Calibration(num_samples=4, batch_size=4))
    course(recipe=recipe, calibration=Calibration(num_samples=5, batch_size=4))
    course(calibration=Calibration(num_samples=1))


def test_trained_weights_must_be_held() -> None:
    with pytest.raises(InputError, match="`pruning.recovery` must be given if pruned weights are trained"):
        course().check(small_model())
    course(recovery=MaskedLoRA()).check(small_model())
    course().check(small_model().requires_grad_(False))


def test_weights_that_an_earlier_cut_masked_are_held_too() -> None:
    model = small_model()
    structure.write(model, masked=True)
    for name, parameter in model.named_parameters():
        if "q_proj" in name:  # which this cut leaves alone
            parameter.data[:, ::2] = 0
        parameter.requires_grad_("q_proj" in name)
    narrow = Recipe(Wanda(), 0.5, DLP(), targets=["down_proj"])
    with pytest.raises(InputError, match="`pruning.recovery` must be given for a model with masks"):
        course(recipe=narrow).check(model)
    course(recipe=narrow).check(model.requires_grad_(False))


def test_an_adapter_on_a_tied_head_is_not_merged_before_a_cut() -> None:
    head = MaskedLoRA(target_modules=["lm_head"])
    course(recovery=head).check(small_model())
    course(TWO, recovery=head).check(small_model(tie_word_embeddings=False))
    for given in (course(TWO, recovery=head), course((Cut(2, 0.5),), before=head, recovery=MaskedLoRA())):
        with pytest.raises(InputError, match="`MaskedLoRA.target_modules` must not have the head, lm_head, if a cut"):
            given.check(small_model())


def test_a_target_becomes_the_sparsity_of_every_cut() -> None:
    """The small Llama has 25,312 parameters, of which 6,912 are half of the channels."""
    recipe = Recipe(MLPWidth(multiple=8), allocation=Uniform(), target_parameters=18_400)
    plan = course((Cut(0, 0.25), Cut(4, 1.0)), recipe)
    resolved = plan.resolved(small_model())
    assert [cut.sparsity for cut in resolved.cuts] == pytest.approx([0.25 * 6912 / 25312, 6912 / 25312])
    assert resolved.recipe is not None
    assert resolved.recipe.sparsity == resolved.cuts[-1].sparsity
    assert resolved.resolved(small_model()) is resolved
    assert plan.settings()["pruning.sparsity"] is None
    assert plan.settings()["pruning.target_parameters"] == 18_400
    told = r"`pruning.sparsity` must be .*, null, got \[0.25, 0.5\]; .* `pruning.target_parameters`, 18400, got null"
    again = course(TWO, Recipe(MLPWidth(multiple=8), 0.5, Uniform()))
    with pytest.raises(InputError, match=told):
        check_settings(again.settings(), plan.settings())
    resolved.check(small_model())


def test_bytes_of_weights_that_are_exported_in_4_bits() -> None:
    recipe = Recipe(MLPWidth(), allocation=Uniform(), target_bytes=9)
    with pytest.raises(InputError, match=r"`pruning.target_bytes` must not count bytes with QLoRA\(.*form merged"):
        course(recipe=recipe, recovery=QLoRA())
    course(recipe=recipe, recovery=QLoRA(form="merged"))


def test_a_perplexity_instead_of_a_sparsity() -> None:
    plan = course(
        (Cut(0, 1.0),), Recipe(Wanda(), 0.0, DLP(), min_rate=0.1), recovery=MaskedLoRA(), target_perplexity=30.0
    )
    resolved = plan.resolved(small_model())
    assert resolved.cuts == (Cut(0, 0.1),)  # the least, until the cut is made
    resolved.check(small_model())
    assert plan.settings()["pruning.sparsity"] is None
    assert plan.settings()["pruning.target_perplexity"] == 30.0
    with pytest.raises(InputError, match="`pruning.target_perplexity` must be above 1, got 0.5"):
        course((Cut(0, 1.0),), target_perplexity=0.5)
    with pytest.raises(InputError, match="`pruning.at_step` must be one step with `pruning.target_perplexity`, got 2"):
        course(TWO, target_perplexity=30.0)
