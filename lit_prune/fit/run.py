"""The execution of a fit plan: the cuts made so far, and the preparation of the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from transformers import PreTrainedModel

from lit_prune.checkpointing.record import RunRecord, Settings
from lit_prune.checkpointing.resume import Resume
from lit_prune.checkpointing.weights import SourceWeights
from lit_prune.data.batches import ValidationData, calibration_batches, validation_data
from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.fit.baseline import measure_baseline
from lit_prune.fit.cut import CutInputs, MeasuredCut, measured_cut
from lit_prune.fit.fsdp import check_unsharded
from lit_prune.fit.plan import FitPlan
from lit_prune.fit.preflight import check_caches, check_scaled_gradients
from lit_prune.fit.teaching import Teaching
from lit_prune.models import structure
from lit_prune.models.on_disk import placed
from lit_prune.progress import log
from lit_prune.recover import Snapshot, gradient_masks
from lit_prune.recover.existing_masks import attach
from lit_prune.report.plain import to_plain
from lit_prune.report.records import Baseline, CutRecord, Record, with_perplexity
from lit_prune.schedule import Cut
from lit_prune.target import StoredBytes


@runtime_checkable
class CountsBytes(Protocol):
    """A callback that knows in which type and format the weights are exported, such as a ResultsCallback."""

    def stored_bytes(self, model: PreTrainedModel) -> StoredBytes:
        """Returns the bytes that the weights of ``model`` would take in the exported folder."""


class PruningRun:
    """Carries out the cuts and recoveries of a fit plan on one LLM.

    Args:
        plan: The fit plan.

    Attributes:
        plan: The fit plan; once the LLM is loaded, with sparsities instead of a target.
        done: Records of the cuts made so far, in order.
        baseline: Record of the LLM before a training without cuts; None if cuts are planned.
        source_weights: The weights that checkpoints can leave out; None if they hold all.
        teaching: The distillation; None without one.
    """

    def __init__(self, plan: FitPlan) -> None:
        self.plan = plan
        self.done: list[CutRecord] = []
        self.baseline: Baseline | None = None
        self.source_weights: SourceWeights | None = None
        self.teaching = None if plan.distillation is None else Teaching(plan.distillation, plan.student())
        self._trainable: set[str] = set()

    @property
    def next_cut(self) -> Cut | None:
        """The next cut; None once all are made."""
        return self.plan.cuts[len(self.done)] if len(self.done) < len(self.plan.cuts) else None

    @property
    def next_aim(self) -> str:
        """The sparsity after the next cut, or the perplexity that it must not exceed, in words."""
        assert self.next_cut is not None
        if self.plan.target_perplexity is not None:
            return f"a perplexity of at most {self.plan.target_perplexity:g}"
        return f"a sparsity of {self.next_cut.sparsity:.4g}"

    def is_due(self, step: int) -> bool:
        """Returns whether the next cut has to be made before the optimizer step ``step``."""
        return self.next_cut is not None and step >= self.next_cut.step

    def prepare(self, trainer: Trainer, model: PreTrainedModel, resume: Resume | None) -> None:
        """Checks that the plan fits the LLM of a new run, or gives the LLM the structure of a checkpoint.

        Args:
            trainer: The Trainer, in the callbacks' `setup`, before its strategy moves or wraps the module.
            model: The LLM, just loaded from its source.
            resume: The checkpoint whose weights are loaded afterwards; None starts a new run.

        Raises:
            InputError: if the plan does not fit.
        """
        check_unsharded(model)
        check_scaled_gradients(self.plan, trainer, model.dtype)
        trainer.precision_plugin.convert_module(model)  # Lightning itself converts the module only after `setup`
        self.resolve(trainer, model)
        # parameters that the LightningModule leaves trainable, and that become trainable again without an adapter
        self._trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if resume is None:
            self.plan.take_zeros(model)
            self.plan.check(model)
        elif resume.record.snapshot is not None:
            self._resume(trainer, model, resume)

    def resolve(self, trainer: Trainer, model: PreTrainedModel) -> None:
        """Turns a target, or shares of bytes, into the sparsities of the plan.

        Args:
            trainer: The Trainer; one of its callbacks may know how the weights are exported.
            model: The LLM, just loaded from its source.

        Raises:
            InputError: if no cut of the LLM reaches the target.
        """
        if self.plan.is_resolved:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        counts = next((callback for callback in callbacks if isinstance(callback, CountsBytes)), None)
        self.plan = self.plan.resolved(model, None if counts is None else counts.stored_bytes(model))

    def begin(self, trainer: Trainer, model: PreTrainedModel) -> None:
        """Prepares the LLM of a new run for training up to the first cut; measures it first if there is no cut."""
        if self.plan.idle:
            return
        # a model with random weights has no source, and no process has all weights of a sharded one
        if not self.plan.full_checkpoint and model.name_or_path and not shards_weights(trainer):
            self.source_weights = SourceWeights.of(model)
        if self.plan.recipe is None:
            validation, device = validation_data(trainer) if self.plan.measure else None, trainer.strategy.root_device
            baseline = measure_baseline(model, validation, device, moves=not shards_weights(trainer))
            attach(model, self.plan.recovery)
            self.baseline = self._with_quantised(baseline, trainer, model, validation)
        elif self.plan.before is not None:
            self.plan.before.attach(model)

    def _resume(self, trainer: Trainer, model: PreTrainedModel, resume: Resume) -> None:
        if self.teaching is not None:  # the teacher is the dense model, which the rebuild changes
            self.teaching.resume(trainer, model, resume.record.teacher)
        resume.rebuild(model, restores=not shards_weights(trainer))
        dropped = resume.record.dropped_weights
        self.source_weights = None if dropped is None else SourceWeights.resumed(dropped)

    def check_teacher(self) -> None:
        """Raises InputError if a run is resumed after its first cut without its teacher."""
        if self.teaching is not None and self.done:
            self.teaching.check_restored()

    @contextmanager
    def cutting(self, trainer: Trainer, model: PreTrainedModel) -> Iterator[MeasuredCut]:
        """Prepares the LLM for the next cut, which the body makes, then records it and attaches the recovery.

        The body must assign the result of ``pipeline.prune``, see :func:`measured_cut`.
        """
        assert self.plan.recipe is not None
        assert self.next_cut is not None
        step, sparsity = self.next_cut
        is_first = not self.done
        self._detach(model, step)
        recipe = replace(self.plan.recipe, sparsity=sparsity)
        batches, settings = calibration_batches(trainer, self.plan.calibration)
        check_caches(self.plan, model, batches, settings)
        validation = validation_data(trainer) if self.plan.measure else None
        if self.teaching is not None and is_first:
            self.teaching.begin(trainer, model, stored=self.source_weights is None or step > 0)
        if recipe.method.changes_shapes:
            self.source_weights = None
        inputs = CutInputs(
            recipe=recipe,
            batches=batches,
            calibration=settings,
            validation=validation,
            device=trainer.strategy.root_device,
            measured=self.plan.measure,
            moves=not shards_weights(trainer),
            step=step,
            statistics=self.plan.statistics,
        ).with_sparsity(model, self.plan.target_perplexity)
        source = self.source_weights
        keeps_values = recipe.method.keeps_values and recipe.reconstruction is None
        with source.through_cut(model, keeps_values=keeps_values) if source else nullcontext():
            with measured_cut(model, inputs) as cut:
                yield cut
            self.done.append(cut.record)
        self._recover(trainer, model, validation)

    def _detach(self, model: PreTrainedModel, step: int) -> None:
        """Merges an adapter into the weights, and makes the parameters trainable that were so before it."""
        attached = self.plan.recovery if self.done else (self.plan.before if step > 0 else None)
        if attached is None:
            return
        attached.detach(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._trainable)

    def _recover(self, trainer: Trainer, model: PreTrainedModel, validation: ValidationData | None) -> None:
        """Attaches the recovery and the distillation to a model that was just cut."""
        if self.plan.recovery is not None:
            self.plan.recovery.attach(model)
            structure.write(model, recovery=repr(self.plan.recovery))
        self.done[-1] = self._with_quantised(self.done[-1], trainer, model, validation)
        if self.teaching is not None:
            self.teaching.attach(model)
            structure.write(model, distillation=repr(self.plan.distillation))

    def _with_quantised(
        self, record: Record, trainer: Trainer, model: PreTrainedModel, validation: ValidationData | None
    ) -> Record:
        """Returns ``record`` with the perplexity after quantisation and before training, if the recovery quantises."""
        recovery, device = self.plan.recovery, trainer.strategy.root_device
        if not self.plan.measure or validation is None or recovery is None or not recovery.quantises:
            return record
        measured = measure(placed(model, device), *validation, label="Perplexity, quantised")
        return with_perplexity(record, "quantised", measured)

    def record(self, settings: Settings, model: PreTrainedModel, state_dict: dict[str, Any], prefix: str) -> RunRecord:
        """Returns the record for a checkpoint; removes the weights that can be restored from ``state_dict``."""
        source = self.source_weights
        return RunRecord(
            settings=settings,
            snapshot=Snapshot.of(model),
            dropped_weights=None if source is None else source.drop_from(state_dict, model, prefix),
            gradient_masks=gradient_masks(model),
            teacher=None if self.teaching is None else self.teaching.record(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the records of the cuts and the baseline, in types that a checkpoint can hold."""
        return {"done": to_plain(self.done), "baseline": to_plain(self.baseline)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.done = [CutRecord.from_dict(stored) for stored in state_dict["done"]]
        baseline = state_dict["baseline"]
        self.baseline = None if baseline is None else Baseline.from_dict(baseline)

    def warn_of_missing_cuts(self, step: int) -> None:
        """Warns if a cut was still due when training ended at ``step``."""
        if self.next_cut is not None:
            log(
                f"Warning: training ended at step {step}, before the cut at step {self.next_cut.step}: "
                f"{len(self.done)} of {len(self.plan.cuts)} cuts were made."
            )

    def log_sparsity(self, trainer: Trainer) -> None:
        """Logs the sparsity after the last cut, of the model and of every block; logs nothing before the first cut."""
        last = self.done[-1] if self.done else self.baseline
        if last is None:
            return
        values = {f"pruning/block_{block}": share for block, share in enumerate(last.achieved)}
        for logger in trainer.loggers:
            logger.log_metrics({"pruning/sparsity": last.sparsity, **values}, step=trainer.global_step)


def attribute_at(pl_module: LightningModule, path: str) -> Any:
    """Returns the attribute at a dotted path of a module; None if there is no such attribute."""
    value: Any = pl_module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def find_model(pl_module: LightningModule, target: str) -> PreTrainedModel:
    """Returns the LLM at the dotted path ``target`` of a LightningModule.

    Raises:
        InputError: if no Hugging Face model is there.
    """
    value = attribute_at(pl_module, target)
    if not isinstance(value, PreTrainedModel):
        raise InputError(
            f"`pruning.target` must be the attribute of {type(pl_module).__name__} that holds a Hugging Face "
            f"model, `{target}` is {type(value).__name__}. It must be set after `configure_model`."
        )
    return value
