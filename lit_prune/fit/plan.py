"""The plan of a fit: the cuts of the LLM, and the recoveries that train it before, between and after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from lightning.pytorch import Trainer
from transformers import PreTrainedModel

from lit_prune.allocate import Plan
from lit_prune.calibration.cached_statistics import CachedStatistics
from lit_prune.calibration.windows import Calibration
from lit_prune.distill import Distillation, Student
from lit_prune.errors import InputError
from lit_prune.models import structure
from lit_prune.models.families import Block
from lit_prune.recipe import Recipe, recipe_record
from lit_prune.reconstruct.reconstruction import check_batches
from lit_prune.recover import Recovery
from lit_prune.recover.existing_masks import check_kept, check_unfilled, take_zeros
from lit_prune.schedule import Cut
from lit_prune.target import StoredBytes
from lit_prune.target_perplexity import check_copies, check_single_cut


@final
@dataclass(frozen=True)
class FitPlan:
    """The cuts, in order, and the recoveries around them.

    Args:
        recipe: Recipe of the cuts, with the sparsity of the last one; None without cuts.
        cuts: Step of each cut and the sparsity after it, or with a target the share of the way to it, see
            :meth:`resolved`; empty without a recipe.
        before: Recovery that trains the LLM before the first cut.
        recovery: Recovery that trains the LLM after each cut, or from the start without cuts.
        distillation: Knowledge distillation from the dense LLM.
        calibration: Calibration text of every cut.
        statistics: Cached statistics for a cut at step 0.
        blocks: Dotted path of the decoder layers in the LLM, for an unknown family.
        keep_zeros: Whether zeros of an LLM without a record are a mask; None raises an error if training would fill
            many.
        measure: Whether perplexity is measured before and after each cut.
        full_checkpoint: Whether every checkpoint holds all weights.
        target_perplexity: Perplexity that the cut must not exceed, instead of a sparsity; see ``find_sparsity``.

    Raises:
        InputError: for several cuts if one of the parts allows only one, and for settings that contradict each other.
    """

    recipe: Recipe | None
    cuts: tuple[Cut, ...]
    before: Recovery | None
    recovery: Recovery | None
    distillation: Distillation | None
    calibration: Calibration
    statistics: CachedStatistics | None
    blocks: str | None
    keep_zeros: bool | None
    measure: bool = True
    full_checkpoint: bool = False
    target_perplexity: float | None = None

    def __post_init__(self) -> None:
        if self.recipe is None:
            if self.before is not None:
                raise InputError(
                    f"`pruning.before` must be null without `pruning.method`, got {self.before}: use "
                    "`pruning.recovery`."
                )
            return
        method, count = self.recipe.method, len(self.cuts)
        self.recipe.allocation.check_windows(self.calibration.num_samples)
        if self.recipe.reconstruction is not None:
            check_batches(self.calibration.batches)
        self._check_bytes()
        self._check_target_perplexity()
        self._check_full(self.before, "before")
        if self.before is not None and self.cuts[0].step == 0:
            raise InputError(
                "`pruning.before` must be null if the first cut comes at step 0, since nothing is trained before it, "
                f"got {self.before}; give a later `pruning.at_step`, or use `pruning.recovery`."
            )
        if self.statistics is not None and self.cuts[-1].step > 0:
            raise InputError(
                "`pruning.statistics` must be null for cuts after step 0, since training changes the model, got cuts "
                f"at {', '.join(str(step) for step, _ in self.cuts)}."
            )
        if count == 1:
            return
        if not method.repeats():
            raise InputError(
                f"`pruning.at_step` must be one step for {method if method.makes_zeros else method.described}, which "
                f"cannot prune a model twice, got {count}: give one, or "
                f"{'a method with the pattern Unstructured or MixedNofM' if method.makes_zeros else 'another method'}."
            )
        if isinstance(self.recipe.allocation, Plan):
            raise InputError(
                f"`pruning.allocation` must not be a Plan for {count} cuts, since it has the rates of one; give one "
                "`pruning.at_step`, or an allocation that scores the blocks."
            )
        if self.recipe.reconstruction is not None and self.recipe.reconstruction.state is not None:
            raise InputError(
                f"`pruning.reconstruction.state` must be null for {count} cuts, since it holds the blocks of one, got "
                f"{self.recipe.reconstruction.state}."
            )
        self._check_full(self.recovery, "recovery")
        if method.makes_zeros:
            self._check_merge(self.recovery, "recovery", f"{count} cuts of masks")

    @property
    def idle(self) -> bool:
        """Whether the plan changes nothing: no cut is made, and no recovery is attached."""
        return self.recipe is None and self.recovery is None

    @property
    def steps(self) -> tuple[int, ...]:
        """The optimizer steps before which cuts are made."""
        return tuple(cut.step for cut in self.cuts)

    @property
    def last_step(self) -> int:
        """The step of the last cut; 0 without cuts."""
        return self.cuts[-1].step if self.cuts else 0

    @property
    def is_resolved(self) -> bool:
        """Whether the plan has sparsities instead of a target."""
        return self.recipe is None or (self.recipe.is_resolved and self.target_perplexity is None)

    def resolved(self, model: PreTrainedModel, stored: StoredBytes | None = None) -> FitPlan:
        """Returns the plan with sparsities instead of a target or of shares of bytes; see :meth:`Recipe.resolved`.

        For a perplexity it is the smallest possible sparsity, until the cut finds another one.
        """
        if self.recipe is None or self.is_resolved:
            return self
        if self.target_perplexity is not None:
            self.recipe.check_method(model, 0.0)
            least = self.recipe.sparsities(model)[0]
            return replace(self, recipe=replace(self.recipe, sparsity=least), cuts=(Cut(self.last_step, least),))
        recipe = self.recipe.resolved(model, stored)
        scale = recipe.sparsity / (self.cuts[-1].sparsity or 1.0)
        return replace(self, recipe=recipe, cuts=tuple(Cut(step, share * scale) for step, share in self.cuts))

    def student(self) -> Student:
        """Returns the description of the student that the teacher needs.

        Raises:
            InputError: without cuts.
        """
        if self.recipe is None:
            raise InputError(
                f"`pruning.distillation` must be null without `pruning.method`, since teacher and student would be the "
                f"same model, got {self.distillation}."
            )
        return Student(self.recipe, self.recovery, self.steps)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that a resumed run must share with the first, by field."""
        recipe: dict[str, Any] = {"method": None}
        cuts: dict[str, Any] = {"at_step": list(self.steps), "sparsity": [share for _, share in self.cuts]}
        if self.recipe is not None:
            targets = {name: getattr(self.recipe, name) for name in ("target_parameters", "target_bytes")}
            targets["target_perplexity"] = self.target_perplexity
            recipe = recipe_record(self.recipe) | targets
            if any(target is not None for target in targets.values()):
                cuts["sparsity"] = [None]
        objects = {name: getattr(self, name) for name in ("before", "recovery", "distillation", "calibration")}
        if self.recipe is None:
            objects["calibration"] = None
        texts = {name: None if value is None else repr(value) for name, value in objects.items()}
        fields = recipe | {name: _unwrapped(value) for name, value in cuts.items()} | texts
        return {f"pruning.{field}": value for field, value in fields.items()}

    def length_settings(self, trainer: Trainer) -> dict[str, Any]:
        """Returns the settings of the training's length that a resumed run must share, by field.

        They matter only to a teacher that reads the windows of the whole training before it begins.
        """
        teacher = None if self.distillation is None else self.distillation.teacher
        fields = (
            ("max_steps", "max_epochs", "limit_train_batches") if teacher is not None and teacher.needs_windows else ()
        )
        return {f"trainer.{field}": getattr(trainer, field) for field in fields}

    def take_zeros(self, model: PreTrainedModel, *, trains: bool = True) -> None:
        """Records the zeros of an LLM that another tool pruned as its mask, if they are to be kept.

        Args:
            model: The LLM, before any change to it.
            trains: Whether the LLM is trained before a cut after step 0; if not, that cut is made at once.

        Raises:
            InputError: if training would fill the zeros, or `keep_zeros` contradicts the plan or the LLM.
        """
        if self.recipe is None or (trains and self.cuts[0].step > 0):
            first = self.recovery if self.recipe is None else self.before
            take_zeros(model, self.keep_zeros, first, blocks=self.blocks)
        elif self.keep_zeros is False and self.recipe.method.makes_zeros:
            raise InputError(
                f"`pruning.keep_zeros` must not be false with {self.recipe.method}: existing zeros stay, and count "
                "toward the sparsity."
            )
        elif self.keep_zeros:
            take_zeros(model, True, None, blocks=self.blocks)

    def check_end(self, steps: float) -> None:
        """Raises InputError if a training of ``steps`` optimizer steps would end before the last cut."""
        last = self.last_step
        if 0 < last >= steps:
            raise InputError(
                f"`pruning.at_step` must be below the number of optimizer steps, {steps} (`trainer.max_steps`), got "
                f"{last}."
            )

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError if one of the cuts or of the recoveries around them does not fit ``model``."""
        if self.recipe is None:
            check_kept(model, self.recovery)
            return
        if self.target_perplexity is not None:
            check_copies(model)
        for _, sparsity in self.cuts:
            blocks = replace(self.recipe, sparsity=sparsity).check(model)
        self._check_trained(blocks)
        if structure.masked(model):
            self._check_merge(self.before, "before", "a model that is masked already")
            if self.before is None and self.cuts[0].step > 0:
                check_unfilled(model, "before", "MaskedLoRA or FullFineTuning")
            if self.recovery is None:
                check_unfilled(model, "recovery", "MaskedLoRA, FullFineTuning or LoRA")
        for recovery in (self.before, self.recovery):
            if recovery is not None:
                recovery.check(model)
        if self.before is not None:
            self.before.check_detach(model)
        if self.recovery is not None and len(self.cuts) > 1:
            self.recovery.check_detach(model)
        method = self.recipe.method
        if method.changes_shapes and self.recovery is not None:
            self.recovery.check_sizes(type(method).__name__, method.size_multiple(model, blocks))

    def _check_full(self, recovery: Recovery | None, field: str) -> None:
        """Raises InputError for a recovery that quantises the weights although a cut comes after it."""
        if recovery is not None and recovery.quantises:
            raise InputError(
                f"`pruning.{field}` must leave the weights in full precision if a cut comes after it, got "
                f"{recovery}: use MaskedLoRA, or LoRA before the first cut, and QLoRA as `pruning.recovery` of one cut."
            )

    def _check_target_perplexity(self) -> None:
        """Raises InputError for what a search for the sparsity of a perplexity does not allow."""
        assert self.recipe is not None
        limit = self.target_perplexity
        if limit is None:
            return
        if not limit > 1:
            raise InputError(f"`pruning.target_perplexity` must be above 1, got {limit:g}.")
        if len(self.cuts) > 1:
            raise InputError(
                f"`pruning.at_step` must be one step with `pruning.target_perplexity`, got {len(self.cuts)}: find the "
                "sparsity by `lit-prune prune`, and give it as `pruning.sparsity`."
            )
        if not self.measure:
            raise InputError("`pruning.measure` must be true with `pruning.target_perplexity`, got false.")
        check_single_cut(self.recipe)

    def _check_bytes(self) -> None:
        """Raises InputError for a budget of bytes whose weights are exported in 4 or 8 bits."""
        assert self.recipe is not None
        recovery = self.recovery
        if not self.recipe.counts_bytes or recovery is None or not recovery.quantises:
            return
        if recovery.export_form(False) != "merged":
            field = "target_bytes" if self.recipe.target is not None else "budget"
            raise InputError(
                f"`pruning.{field}` must not count bytes with {recovery}, whose weights are exported in another "
                "precision than they are cut in: count parameters, or train with `--pruning.recovery.form merged`."
            )

    def _check_merge(self, recovery: Recovery | None, field: str, where: str) -> None:
        if recovery is not None and not recovery.merge_keeps_zeros:
            raise InputError(
                f"`pruning.{field}` must keep zeros when its adapter is merged, for {where}, got {recovery}: use "
                "MaskedLoRA, or make one cut."
            )

    def _check_trained(self, blocks: Sequence[Block]) -> None:
        """Raises InputError if training would change pruned weights from zero."""
        assert self.recipe is not None
        if not self.recipe.method.makes_zeros:
            return
        trained = any(linear.parameter.requires_grad for block in blocks for linear in block.linears.values())
        if self.recovery is None and trained:
            raise InputError(
                "`pruning.recovery` must be given if pruned weights are trained, or training fills the zeros: use "
                "MaskedLoRA, FullFineTuning or LoRA, freeze the LLM in your LightningModule, or prune without training "
                "with `lit-prune prune`."
            )


def _unwrapped(values: list[Any]) -> Any:
    """Returns the only value of a list of one, as users write it, or else the list."""
    return values[0] if len(values) == 1 else values
