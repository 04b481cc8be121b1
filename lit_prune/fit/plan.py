"""The plan of a fit: which cuts are made of the LLM, and what is trained before, between and after them."""

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
from lit_prune.fit.existing_masks import check_kept, check_unfilled, take_zeros
from lit_prune.models import structure
from lit_prune.models.families import Block
from lit_prune.recipe import Recipe, recipe_record
from lit_prune.recover import Recovery
from lit_prune.schedule import Cut


@final
@dataclass(frozen=True)
class FitPlan:
    """The cuts, in order, and the recoveries around them; refuses what does not go together.

    Args:
        recipe: What a cut does, with the last one's sparsity; null where nothing is cut.
        cuts: The step of each cut and the sparsity after it; empty where `recipe` is null.
        before: What is trained before the first cut.
        recovery: What is trained after a cut, or from the start where nothing is cut.
        distillation: How the dense LLM teaches the pruned one.
        calibration: How much text the statistics are taken over.
        stored: Cached statistics for a cut at step 0.
        blocks: Dotted path of the decoder layers in an LLM of a family that is not known.
        keep_zeros: Whether zeros of an LLM without a record are a mask; null asks where training would fill them.
        measure: Whether the perplexity is measured before and after each cut.
        full_checkpoint: Whether every checkpoint holds all weights.

    Raises:
        InputError: for several cuts where the parts allow one, and for adapters that would be lost at a cut.
    """

    recipe: Recipe | None
    cuts: tuple[Cut, ...]
    before: Recovery | None
    recovery: Recovery | None
    distillation: Distillation | None
    calibration: Calibration
    stored: CachedStatistics | None
    blocks: str | None
    keep_zeros: bool | None
    measure: bool = True
    full_checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.recipe is None:
            if self.before is not None:
                raise InputError(
                    f"`pruning.before` must be null where nothing is cut, use `recovery`; got {self.before}."
                )
            return
        method, count = self.recipe.method, len(self.cuts)
        self._check_full(self.before, "before")
        if self.before is not None and self.cuts[0].step == 0:
            raise InputError(
                "`pruning.before` must be null where the first cut comes at step 0, nothing is trained before it, got "
                f"{self.before}; give a later `pruning.at_step`, or use `pruning.recovery`."
            )
        if self.stored is not None and self.cuts[-1].step > 0:
            raise InputError(
                "`pruning.statistics` must be null for cuts after step 0, the model is another by then, got cuts at "
                f"{', '.join(str(step) for step, _ in self.cuts)}."
            )
        if count == 1:
            if method.changes_shapes and self.recovery is not None:
                self.recovery.check_sliced()
            return
        if not method.repeats():
            raise InputError(
                f"`pruning.at_step` must be one step for {method}, which cannot cut again what it has cut, got "
                f"{count}: give one, or use masks that can be cut again, Unstructured or MixedNofM."
            )
        if isinstance(self.recipe.allocation, Plan):
            raise InputError(
                f"`pruning.allocation` must not be a Plan for {count} cuts, it has the rates of one; give one "
                "`pruning.at_step`, or an allocation that scores."
            )
        self._check_full(self.recovery, "recovery")
        self._check_folds(self.recovery, "recovery", f"{count} cuts of masks")

    @property
    def idle(self) -> bool:
        """Whether the LLM is left as it is: nothing is cut, and no recovery is attached."""
        return self.recipe is None and self.recovery is None

    @property
    def steps(self) -> tuple[int, ...]:
        """The optimizer steps before which cuts come."""
        return tuple(cut.step for cut in self.cuts)

    @property
    def last_step(self) -> int:
        """The step of the last cut; 0 where nothing is cut."""
        return self.cuts[-1].step if self.cuts else 0

    def student(self) -> Student:
        """Returns what the teacher must know of the student.

        Raises:
            InputError: where nothing is cut.
        """
        if self.recipe is None:
            raise InputError(
                f"`pruning.distillation` must be null where `pruning.method` is, a model does not teach itself, got "
                f"{self.distillation}."
            )
        return Student(self.recipe, self.recovery, self.steps)

    def settings(self) -> dict[str, Any]:
        """Returns what a resumed run must have in common with the first, by the names that the user gives."""
        recipe = {"method": None} if self.recipe is None else recipe_record(self.recipe)
        made: dict[str, Any] = {"at_step": list(self.steps), "sparsity": [share for _, share in self.cuts]}
        objects = {name: getattr(self, name) for name in ("before", "recovery", "distillation", "calibration")}
        if self.recipe is None:
            objects["calibration"] = None
        shown = {name: None if value is None else repr(value) for name, value in objects.items()}
        fields = recipe | {name: _unwrapped(value) for name, value in made.items()} | shown
        return {f"pruning.{field}": value for field, value in fields.items()}

    def length_settings(self, trainer: Trainer) -> dict[str, Any]:
        """Returns the length of the training where a resumed run must have that in common, too.

        It must where a teacher reads the windows of the whole training before it begins.
        """
        teacher = None if self.distillation is None else self.distillation.teacher
        fields = (
            ("max_steps", "max_epochs", "limit_train_batches") if teacher is not None and teacher.needs_windows else ()
        )
        return {f"trainer.{field}": getattr(trainer, field) for field in fields}

    def take_zeros(self, model: PreTrainedModel, *, trains: bool = True) -> None:
        """Takes the zeros of an LLM that somebody else pruned as its mask; refuses a fit that would fill them.

        Args:
            model: The LLM, before anything is done to it.
            trains: Whether it is trained up to the first cut; else that comes at once, whatever its step.
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
        """Raises InputError for cuts that a training of so many steps would end before."""
        last = self.last_step
        if 0 < last >= steps:
            raise InputError(
                f"`pruning.at_step` must be below the number of optimizer steps, {steps} (`trainer.max_steps`), got "
                f"{last}."
            )

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError where ``model`` does not allow one of the cuts, or what is trained around them."""
        if self.recipe is None:
            check_kept(model, self.recovery)
            return
        for _, sparsity in self.cuts:
            blocks = replace(self.recipe, sparsity=sparsity).check(model)
        self._check_trained(blocks)
        if structure.masked(model):
            self._check_folds(self.before, "before", "a model that is masked already")
            if self.before is None and self.cuts[0].step > 0:
                check_unfilled(model, "before", "MaskedLoRA or FullFineTuning")
            if self.recovery is None:
                check_unfilled(model, "recovery", "MaskedLoRA, FullFineTuning or LoRA")
        for recovery in (self.before, self.recovery):
            if recovery is not None:
                recovery.check(model)

    def _check_full(self, recovery: Recovery | None, field: str) -> None:
        """Refuses a recovery that quantises where a cut comes after it."""
        if recovery is not None and recovery.quantises:
            raise InputError(
                f"`pruning.{field}` must leave the weights in full precision where a cut comes after it, got "
                f"{recovery}: use MaskedLoRA, or LoRA before the first cut, and QLoRA as `pruning.recovery` of one cut."
            )

    def _check_folds(self, recovery: Recovery | None, field: str, where: str) -> None:
        if recovery is not None and not recovery.merge_keeps_zeros:
            raise InputError(
                f"`pruning.{field}` must keep zeros when it is folded into the weights, for {where}, got {recovery}: "
                "use MaskedLoRA, or make one cut."
            )

    def _check_trained(self, blocks: Sequence[Block]) -> None:
        """Refuses a fit that would train pruned weights away from zero."""
        assert self.recipe is not None
        if not self.recipe.method.makes_zeros:
            return
        trained = any(linear.parameter.requires_grad for block in blocks for linear in block.linears.values())
        if self.recovery is None and trained:
            raise InputError(
                "`pruning.recovery` must be given where pruned weights are trained, or training fills the zeros: use "
                "MaskedLoRA, FullFineTuning or LoRA, freeze the LLM yourself, or prune without training by `lit-prune "
                "prune`."
            )


def _unwrapped(values: list[Any]) -> Any:
    """Returns the value of a list of one, as users write it; a longer list as it is."""
    return values[0] if len(values) == 1 else values
