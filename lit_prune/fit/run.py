"""A fit plan while it is carried out: what was done so far, and what the next cut is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision
from transformers import PreTrainedModel

from lit_prune.checkpointing.record import RunRecord, Settings
from lit_prune.checkpointing.resume import Resume
from lit_prune.checkpointing.weights import SourceWeights
from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.fit.baseline import measure_baseline
from lit_prune.fit.batches import ValidationData, calibration_batches, validation_data
from lit_prune.fit.cut import CutInputs, MeasuredCut, measured_cut
from lit_prune.fit.existing_masks import attach
from lit_prune.fit.fsdp import check_whole
from lit_prune.fit.plan import FitPlan
from lit_prune.fit.preflight import check_cached_statistics
from lit_prune.fit.teaching import Teaching
from lit_prune.models import structure
from lit_prune.models.on_disk import placed
from lit_prune.progress import log
from lit_prune.recover import Snapshot, gradient_masks
from lit_prune.report.plain import to_plain
from lit_prune.report.records import Baseline, CutRecord, Record, with_perplexity
from lit_prune.schedule import Cut


class PruningRun:
    """The cuts of a fit plan on one LLM, and what is trained around them.

    Args:
        plan: What is to be done.

    Attributes:
        done: The cuts that were made, in order.
        baseline: What the LLM was before a training that cuts nothing; None where cuts are planned.
        source_weights: Which weights checkpoints can leave out; None where they hold all.
        teaching: The distillation; None without.
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
        """The cut that comes next; None when all are made."""
        return self.plan.cuts[len(self.done)] if len(self.done) < len(self.plan.cuts) else None

    @property
    def next_sparsity(self) -> float:
        """The sparsity after the next cut."""
        assert self.next_cut is not None
        return self.next_cut.sparsity

    def is_due(self, step: int) -> bool:
        """Returns whether the next cut comes before the optimizer step ``step``."""
        return self.next_cut is not None and step >= self.next_cut.step

    def start(self, trainer: Trainer, model: PreTrainedModel, resume: Resume | None) -> None:
        """Prepares the LLM for training up to the first cut, or as a checkpoint has it.

        Args:
            trainer: Its strategy has not moved or wrapped anything yet.
            model: The LLM, fresh from its source.
            resume: The checkpoint whose weights are loaded after this; None begins a new run.
        """
        check_whole(model)
        if isinstance(trainer.precision_plugin, HalfPrecision):  # Lightning converts only after `setup`
            trainer.precision_plugin.convert_module(model)
        # a recovery that is folded away gives back what the LightningModule leaves trainable
        self._trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if resume is None:
            self._begin(trainer, model)
        elif resume.record.snapshot is not None:
            self._resume(trainer, model, resume)

    def _begin(self, trainer: Trainer, model: PreTrainedModel) -> None:
        self.plan.take_zeros(model)
        self.plan.check(model)
        if self.plan.idle:
            return
        # a model that was made on the spot has no source, and of one that is sharded no process has all weights
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
        if self.teaching is not None:  # it is made of the dense model, so before the rebuild
            self.teaching.resume(trainer, model, resume.record.teacher)
        resume.rebuild(model, restores=not shards_weights(trainer))
        dropped = resume.record.dropped_weights
        self.source_weights = None if dropped is None else SourceWeights.resumed(dropped)

    def check_teacher(self) -> None:
        """Raises InputError where a run goes on after its first cut without the teacher that it had."""
        if self.teaching is not None and self.done:
            self.teaching.check_begun()

    @contextmanager
    def cutting(self, trainer: Trainer, model: PreTrainedModel) -> Iterator[MeasuredCut]:
        """Prepares the LLM for the next cut, which the body makes, and for its recovery after it; records the cut.

        The body prunes, as :func:`measured_cut` says.
        """
        assert self.plan.recipe is not None
        assert self.next_cut is not None
        step, sparsity = self.next_cut
        is_first = not self.done
        self._fold(model, step)
        recipe = replace(self.plan.recipe, sparsity=sparsity)
        batches, settings = calibration_batches(trainer, self.plan.calibration)
        check_cached_statistics(self.plan, model, batches, settings)
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
            statistics=self.plan.stored,
        )
        source = self.source_weights
        with source.through_cut(model, keeps_values=recipe.method.keeps_values) if source else nullcontext():
            with measured_cut(model, inputs) as cut:
                yield cut
            self.done.append(cut.record)
        self._recover(trainer, model, validation)

    def _fold(self, model: PreTrainedModel, step: int) -> None:
        """Folds an adapter into the weights, and lets train again what could be trained before it."""
        attached = self.plan.recovery if self.done else (self.plan.before if step > 0 else None)
        if attached is None:
            return
        attached.detach(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._trainable)

    def _recover(self, trainer: Trainer, model: PreTrainedModel, validation: ValidationData | None) -> None:
        """Attaches the recovery and the teacher to a model that was just cut."""
        if self.plan.recovery is not None:
            self.plan.recovery.attach(model)
            structure.write(model, recovery=repr(self.plan.recovery))
        self.done[-1] = self._with_quantised(self.done[-1], trainer, model, validation)
        if self.teaching is not None:
            self.teaching.put_on(model)
            structure.write(model, distillation=repr(self.plan.distillation))

    def _with_quantised(
        self, record: Record, trainer: Trainer, model: PreTrainedModel, validation: ValidationData | None
    ) -> Record:
        """Returns ``record`` with the perplexity of a model that was just quantised, its adapter still untrained."""
        recovery, device = self.plan.recovery, trainer.strategy.root_device
        if not self.plan.measure or validation is None or recovery is None or not recovery.quantises:
            return record
        measured = measure(placed(model, device), *validation, label="Perplexity, quantised")
        return with_perplexity(record, "quantised", measured)

    def record(self, settings: Settings, model: PreTrainedModel, state_dict: dict[str, Any], prefix: str) -> RunRecord:
        """Returns what a checkpoint must hold; takes the weights that can be restored out of ``state_dict``."""
        source = self.source_weights
        return RunRecord(
            settings=settings,
            snapshot=Snapshot.of(model),
            dropped_weights=None if source is None else source.drop_from(state_dict, model, prefix),
            gradient_masks=gradient_masks(model),
            teacher=None if self.teaching is None else self.teaching.record(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the cuts that were made and the baseline, in types that a checkpoint can hold."""
        return {"done": to_plain(self.done), "baseline": to_plain(self.baseline)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.done = [CutRecord.from_dict(stored) for stored in state_dict["done"]]
        baseline = state_dict["baseline"]
        self.baseline = None if baseline is None else Baseline.from_dict(baseline)

    def warn_of_missing_cuts(self, step: int) -> None:
        """Warns where the training ended at ``step``, before a cut."""
        if self.next_cut is not None:
            log(
                f"Warning: training ended at step {step}, before the cut at step {self.next_cut.step}: "
                f"{len(self.done)} of {len(self.plan.cuts)} cuts were made."
            )

    def log_sparsity(self, trainer: Trainer) -> None:
        """Logs the sparsity that the last cut has reached, and every block's; nothing before the first cut."""
        last = self.done[-1] if self.done else self.baseline
        if last is None:
            return
        values = {f"pruning/block_{block}": share for block, share in enumerate(last.achieved)}
        for logger in trainer.loggers:
            logger.log_metrics({"pruning/sparsity": last.sparsity, **values}, step=trainer.global_step)


def attribute_at(pl_module: LightningModule, path: str) -> Any:
    """Returns the attribute at a dotted path of a module; None where there is none."""
    value: Any = pl_module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def find_model(pl_module: LightningModule, target: str) -> PreTrainedModel:
    """Returns the LLM at the dotted path ``target`` of a LightningModule.

    Raises:
        InputError: if there is none.
    """
    value = attribute_at(pl_module, target)
    if not isinstance(value, PreTrainedModel):
        raise InputError(
            f"`pruning.target` must be the attribute of {type(pl_module).__name__} that holds a Hugging Face "
            f"model, `{target}` is {type(value).__name__}. It must be there once `configure_model` was called."
        )
    return value
