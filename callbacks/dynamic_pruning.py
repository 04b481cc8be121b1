"""DynamicPruningCallback: at chosen steps it scores the blocks, decides what each gives, prunes, and lets heal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy
from lit_prune.callbacks.best_scores import reset_best_scores
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.allocate import DLP, Allocation
from lit_prune.allocate.budget import Budget
from lit_prune.calibration.cached_statistics import read_statistics
from lit_prune.calibration.windows import Batch, Calibration
from lit_prune.checkpointing.position import settle_epoch
from lit_prune.checkpointing.random_states import random_states, restore_random_states
from lit_prune.checkpointing.resume import PROCESSES, Settings, check_settings, run_settings, stored_run
from lit_prune.checkpointing.weights import Source, fill
from lit_prune.distill import Distillation
from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.fit.baseline import measure_baseline
from lit_prune.fit.batches import (
    calibration_batches,
    calibration_settings,
    check_calibration,
    check_processes,
    named,
    validation_data,
)
from lit_prune.fit.cut import cut
from lit_prune.fit.existing_masks import attach
from lit_prune.fit.fsdp import begin_states
from lit_prune.fit.fsdp_checks import check_cuts, check_sharded, check_strategy, check_whole
from lit_prune.fit.plan import FitPlan
from lit_prune.fit.teaching import Teaching
from lit_prune.models import structure
from lit_prune.models.on_disk import placed
from lit_prune.models.quantised import MASK
from lit_prune.pipeline import check_expected_statistics, check_statistics
from lit_prune.progress import log
from lit_prune.prune import Method
from lit_prune.recipe import Recipe
from lit_prune.recover import (
    Recovery,
    Snapshot,
    freeze_zeros,
    freezes_zeros,
    gradient_masks,
    restore_gradient_masks,
)
from lit_prune.report.plain import to_plain
from lit_prune.report.records import Baseline, CutRecord, Record, with_perplexity
from lit_prune.schedule import Cut, Schedule, cuts


class DynamicPruningCallback(Callback):
    """Prunes the Hugging Face LLM of a LightningModule before chosen steps, and readies it for recovery.

    The LLM is found as ``pl_module.model``. Calibration windows come from the data module's
    ``calibration_windows(num_samples, seq_length, seed)`` where it has one, else from the first batches of the training
    dataloader (dicts of `input_ids` and, where there is padding, `attention_mask`).

    At a cut what an adapter has learnt is folded into the weights, the blocks are scored anew and pruned, and a fresh
    adapter, optimizer and learning-rate schedule begin. Cuts at several steps reach rising targets.

    A run is resumed by ``trainer.ckpt_path = path`` before ``trainer.fit(...)``: a path that is passed to fit itself is
    known only after a cut at step 0, which is then done once more before the checkpoint's weights load.

    Args:
        method: How the blocks become smaller: by masks, such as Wanda or SparseGPT, or by Slicing; null cuts
            nothing: `recovery` then trains the LLM as it is, and what was pruned before stays pruned.
        sparsity: Share to remove, mean over the blocks, in [0, 1): of the linears' weights (see `budget`); for Slicing,
            of the dimensions of the residual stream. For several cuts the last one's, or a list with each one's.
        allocation: How blocks are scored and the sparsity is spread over them: DLP, OWL, AlphaPruning, LayerRedundancy,
            Uniform, a Plan from a file, or a Search that tries rates out; null is DLP.
        at_step: Optimizer step before which the cut comes, or a list of steps; 0 is the start of fit. Slicing makes
            one cut.
        schedule: How sparsity rises over several cuts, Cubic or Linear; null is OneShot for one cut, Cubic for several.
        before: What is trained before the first cut, where that comes later than step 0, such as LoRA; null trains
            what the LightningModule leaves trainable, which for PrunableLM is everything, and must not be weights under
            a mask.
        recovery: What is trained after a cut, with a null `method` from the start: LoRA, MaskedLoRA, QLoRA (after the
            one cut) or FullFineTuning; null trains what the LightningModule leaves trainable, which must not be weights
            under a mask.
        distillation: The LLM as it is right before the first cut teaches what is left of it, by its own probabilities:
            the LLM must be called with `labels`, and the `loss` that it returns be trained on. null trains on the text
            alone.
        calibration: How much text the statistics are taken over, at every cut.
        min_rate: Least share that any block gives.
        max_rate: Greatest share that any block gives.
        targets: Name suffixes or regular expressions of the linears to prune; null takes all in the blocks, and Slicing
            can do nothing else.
        ignore: Suffixes or regular expressions of linears to leave alone.
        blocks: Dotted path of the decoder layers in the LLM, for a family that is not known.
        budget: What `sparsity` is a share of: `linears`, the weights that are pruned, or `parameters`, all parameters
            of the LLM, tied weights counted once, of which the linears then give more than that share.
        statistics: Folder or file that `lit-prune score` wrote for the same model and calibration text: a cut at step
            0 reads its statistics in place of a pass of its own. What differs is refused.
        target: Dotted path of the LLM in the LightningModule.
        measure: Measure the perplexity on the validation data before and after each cut (as much of it as the Trainer's
            `limit_val_batches` allows); for Slicing the tokens per second, too.
        keep_zeros: Take the zeros in the linears of an LLM without a record, one that somebody else pruned, for a mask,
            and keep them; null asks where there are many and training would fill them.
        full_checkpoint: Store all weights in every checkpoint; else those that are frozen and that the LLM's source
            has, as they are or under a mask, are left out.

    Raises:
        InputError: for settings that cannot be; before anything is touched.
    """

    def __init__(
        self,
        method: Method | None,
        sparsity: float | list[float] = 0.5,
        allocation: Allocation | None = None,
        at_step: int | list[int] = 0,
        schedule: Schedule | None = None,
        before: Recovery | None = None,
        recovery: Recovery | None = None,
        distillation: Distillation | None = None,
        calibration: Calibration = Calibration(),  # noqa: B008 (frozen)
        min_rate: float = 0.0,
        max_rate: float = 0.99,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        blocks: str | None = None,
        budget: Budget = "linears",
        statistics: str | None = None,
        target: str = "model",
        measure: bool = True,
        keep_zeros: bool | None = None,
        full_checkpoint: bool = False,
    ) -> None:
        recipe: Recipe | None = None
        steps: tuple[Cut, ...] = ()
        if method is not None:
            steps = cuts(at_step, sparsity, schedule)
            recipe = Recipe(
                method=method,
                sparsity=steps[-1].sparsity,
                allocation=allocation or DLP(),
                min_rate=min_rate,
                max_rate=max_rate,
                targets=targets,
                ignore=ignore,
                blocks=blocks,
                budget=budget,
            )
        self.fit_plan = FitPlan(
            recipe=recipe,
            cuts=steps,
            before=before,
            recovery=recovery,
            distillation=distillation,
            calibration=calibration,
            stored=None if statistics is None else read_statistics(statistics),
            blocks=blocks,
            keep_zeros=keep_zeros,
        )
        self.teaching = None if distillation is None else Teaching(distillation, self.fit_plan.student())
        self.target, self.measure, self.full_checkpoint = target, measure, full_checkpoint
        self.done: list[CutRecord] = []
        self.baseline: Baseline | None = None
        self.source: Source | None = None
        self._trainable: set[str] = set()
        self._random: dict[str, Any] | None = None
        self._settings: Settings = {}
        self._holds = False
        self._between_epochs = False

    @property
    def cut_steps(self) -> tuple[int, ...]:
        """The optimizer steps before which cuts come; PrunableLM fits its warm-up to them."""
        return self.fit_plan.steps

    @property
    def following(self) -> Cut | None:
        """The cut that comes next; None when all are done."""
        return self.fit_plan.cuts[len(self.done)] if len(self.done) < len(self.fit_plan.cuts) else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes a cut that is due at the start of fit, or rebuilds what was done before a checkpoint's weights load."""
        if stage != "fit":
            return
        self.check_trainer(trainer)
        if not self.fit_plan.idle:
            if trainer.max_steps == -1:
                self.fit_plan.check_end(trainer.estimated_stepping_batches)
            distributed.agree_on_threads()
        if self.fit_plan.recipe is not None and self.fit_plan.recipe.needs_text:
            check_calibration(trainer, self.fit_plan.calibration)
        self._settings = self.settings(trainer, pl_module)
        stored = self.checkpointed(str(trainer.ckpt_path)) if trainer.ckpt_path else None
        if stored is not None:
            check_settings(self._settings, stored["settings"])
        pl_module.configure_model()
        if self.fit_plan.idle and not isinstance(_at(pl_module, self.target), PreTrainedModel):
            return
        model = self.find_model(pl_module)
        check_whole(model)
        if isinstance(trainer.precision_plugin, HalfPrecision):
            trainer.precision_plugin.convert_module(model)
        self._trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if stored is not None:
            self._rebuild(trainer, model, stored)
        else:
            self._begin(trainer, model)
        self._holds = freezes_zeros(model)
        _leave_masks_alone(pl_module)

    def _begin(self, trainer: Trainer, model: PreTrainedModel) -> None:
        """Checks everything against the LLM, and makes the cut that comes before all training."""
        self.fit_plan.take_zeros(model)
        self.fit_plan.check(model)
        if self.fit_plan.idle:
            return
        # a model that was made on the spot has no source, and of one that is sharded no process has all weights
        if not self.full_checkpoint and model.name_or_path and not shards_weights(trainer):
            self.source = Source.of(model)
        if self.fit_plan.recipe is None:
            validation, device = validation_data(trainer) if self.measure else None, trainer.strategy.root_device
            baseline = measure_baseline(model, validation, device, moves=not shards_weights(trainer))
            attach(model, self.fit_plan.recovery)
            self.baseline = self._with_quantised(baseline, model, validation, device)
        elif self.fit_plan.cuts[0].step == 0:
            self._cut(trainer, model)
        elif self.fit_plan.before is not None:
            self.fit_plan.before.attach(model)

    def _rebuild(self, trainer: Trainer, model: PreTrainedModel, stored: dict[str, Any]) -> None:
        """Gives ``model`` the structure of a checkpoint, and lets what that leaves out be filled in when it loads."""
        if self.fit_plan.idle and "record" not in stored:  # of a LightningModule that keeps none itself
            return
        if self.teaching is not None:
            self.teaching.resume(trainer, model, stored["teacher"])
        Snapshot.from_dict(stored).rebuild(model)
        left_out = stored["left_out"]
        if shards_weights(trainer):
            return
        self.source = None if left_out is None else Source.resumed(left_out)

        def put_back(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_args: Any) -> None:
            handle.remove()
            fill(module, state_dict, prefix, left_out or {})

        handle = model.register_load_state_dict_pre_hook(put_back)

    def _cut(self, trainer: Trainer, model: PreTrainedModel) -> None:
        """Makes the following cut: folds what was learnt, prunes, and attaches what is to heal."""
        assert self.fit_plan.recipe is not None
        assert self.following is not None
        step, sparsity = self.following
        attached = self.fit_plan.recovery if self.done else (self.fit_plan.before if step > 0 else None)
        if attached is not None:
            attached.detach(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in self._trainable)
        recipe = replace(self.fit_plan.recipe, sparsity=sparsity)
        calibration = calibration_batches(trainer, self.fit_plan.calibration)
        self.check_statistics(model, *calibration)
        validation, device = validation_data(trainer), trainer.strategy.root_device
        if self.teaching is not None and not self.done:
            self.teaching.begin(trainer, model, stored=self.source is None or step > 0)
        if recipe.method.changes_shapes:
            self.source = None
        noted = self.source and self.source.through_cut(model, keeps_values=recipe.method.keeps_values)
        with noted or nullcontext():
            done = cut(
                model,
                recipe,
                calibration,
                validation,
                device,
                measured=self.measure,
                moves=not shards_weights(trainer),
                step=step,
                stored=self.fit_plan.stored,
            )
        self.done.append(done)
        if self.fit_plan.recovery is not None:
            self.fit_plan.recovery.attach(model)
            structure.write(model, recovery=repr(self.fit_plan.recovery))
        self.done[-1] = self._with_quantised(done, model, validation, device)
        if self.teaching is not None:
            self.teaching.put_on(model)
            structure.write(model, distillation=repr(self.fit_plan.distillation))

    def _with_quantised(
        self,
        record: Record,
        model: PreTrainedModel,
        validation: tuple[Iterable[Batch], str] | None,
        device: torch.device,
    ) -> Record:
        """Returns ``record`` with the perplexity of a model that was just quantised, its adapter still untrained."""
        recovery = self.fit_plan.recovery
        if not self.measure or validation is None or recovery is None or not recovery.quantises:
            return record
        measured = measure(placed(model, device), *validation, label="Perplexity, quantised")
        return with_perplexity(record, "quantised", measured)

    def check_statistics(self, model: PreTrainedModel, batches: list[Batch], settings: dict[str, Any]) -> None:
        """Raises InputError where the statistics that were stored are not those of this model and this text."""
        if self.fit_plan.stored is not None and self.fit_plan.recipe is not None:
            check_statistics(self.fit_plan.stored, model, batches, self.fit_plan.recipe, named(settings, model))

    def check_trainer(self, trainer: Trainer) -> None:
        """Raises InputError for a strategy that cuts are not made under, and for cuts that the training ends before."""
        check_strategy(trainer)
        if not self.fit_plan.idle:
            check_processes(trainer)
            if trainer.max_steps != -1:
                self.fit_plan.check_end(trainer.max_steps)
            check_cuts(trainer, self.fit_plan.last_step, self.fit_plan.recovery, self.fit_plan.distillation)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a resumed run read on in its data; readies a model that was sharded since it was cut."""
        if trainer.ckpt_path:  # gives its position only to a loader that is made after it; who counted steps made one
            trainer.fit_loop._combined_loader = None
        model = _at(pl_module, self.target)
        if not shards_weights(trainer) or not isinstance(model, PreTrainedModel):
            return
        check_sharded(model)
        if self._holds:
            freeze_zeros(model)
        for optimizer in trainer.optimizers:
            begin_states(pl_module, optimizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the random numbers back where a checkpoint was taken; logs a cut that came before."""
        if self._between_epochs:  # with `max_steps` Lightning takes every resume for one within an epoch
            trainer.fit_loop.epoch_loop.restarting = False
            self._between_epochs = False
        if self.teaching is not None and self.done:
            self.teaching.check_begun()
        if self._random is not None:
            restore_random_states(self._random)
        elif self.done or self.baseline:
            self._log(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Makes the cut that is due: the step is reached at the first batch of its window of accumulated gradients."""
        if self.following is None or trainer.global_step < self.following.step:
            return
        model = self.find_model(pl_module)
        log(f"Step {trainer.global_step}: cutting to a sparsity of {self.following.sparsity:.4g}")
        pl_module.zero_grad(set_to_none=True)
        self._cut(trainer, model)
        _train_on(trainer)
        reset_best_scores(trainer)
        self._log(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the parts of a loss that a teacher had to do with."""
        if self.teaching is not None:
            self.teaching.log(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so where training ended before a cut."""
        if self.following is not None:
            log(
                f"Warning: training ended at step {trainer.global_step}, before the cut at step {self.following.step}: "
                f"{len(self.done)} of {len(self.fit_plan.cuts)} cuts were made."
            )

    def _log(self, trainer: Trainer) -> None:
        """Logs the sparsity that a cut has reached, and every block's."""
        record = self.done[-1] if self.done else self.baseline
        assert record is not None
        values = {f"pruning/block_{block}": share for block, share in enumerate(record.achieved)}
        for logger in trainer.loggers:
            logger.log_metrics({"pruning/sparsity": record.sparsity, **values}, step=trainer.global_step)

    def find_model(self, pl_module: LightningModule) -> PreTrainedModel:
        """Returns the LLM of a LightningModule.

        Raises:
            InputError: if there is none at ``target``.
        """
        found = _at(pl_module, self.target)
        if not isinstance(found, PreTrainedModel):
            raise InputError(
                f"`pruning.target` must be the attribute of {type(pl_module).__name__} that holds a Hugging Face "
                f"model, `{self.target}` is {type(found).__name__}. It must be there once `configure_model` was called."
            )
        return found

    def settings(self, trainer: Trainer, pl_module: LightningModule) -> Settings:
        """Returns the settings that a resumed run must have in common with the first."""
        taught = {} if self.teaching is None else self.teaching.settings(trainer)
        return self.fit_plan.settings() | run_settings(trainer, pl_module) | taught

    def checkpointed(self, path: str) -> dict[str, Any]:
        """Returns what a checkpoint says was done to the LLM.

        Raises:
            InputError: if it is no checkpoint of a fit, or not what this run would do was done.
        """
        stored = stored_run(path)
        check_settings(self.fit_plan.settings(), stored["settings"])
        return stored

    def check_resumed(self, trainer: Trainer, pl_module: LightningModule, datamodule: Any, path: str) -> None:
        """Raises InputError for a checkpoint of another run, as far as that is known before any text is read."""
        expected: Settings = getattr(datamodule, "expected_settings", dict)()
        own = self.settings(trainer, pl_module) | expected
        own.pop(PROCESSES)  # which are not there yet
        check_settings(own, stored_run(path)["settings"])

    def check_unloaded(self, model: PreTrainedModel, datamodule: Any, *, trains: bool) -> None:
        """Raises InputError for what does not fit ``model``, whose weights are not there yet.

        Names of linears, adapters, and statistics of another text or other versions.
        """
        if self.fit_plan.recipe is not None:
            self.fit_plan.recipe.find(model)
        for recovery in (self.fit_plan.before, self.fit_plan.recovery) if trains else ():
            if recovery is not None:
                recovery.check(model)
        if self.fit_plan.stored is not None and self.fit_plan.recipe is not None:
            settings = named(calibration_settings(datamodule, self.fit_plan.calibration), model)
            check_expected_statistics(self.fit_plan.stored, model, self.fit_plan.recipe, settings)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores what the LLM was made into and the run's settings; leaves out weights that its source has."""
        stored: dict[str, Any] = {"settings": self._settings, "left_out": None}
        if not self.fit_plan.idle:
            model = self.find_model(pl_module)
            teacher = None if self.teaching is None else self.teaching.state()
            stored |= Snapshot.of(model).to_dict() | {"held": gradient_masks(model), "teacher": teacher}
            if self.source is not None:
                stored["left_out"] = self.source.strip(model, checkpoint["state_dict"], f"{self.target}.")
        checkpoint[structure.KEY] = stored

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes up which weights training holds at zero; the weights are loaded by now, the loops are not."""
        self._between_epochs = settle_epoch(checkpoint["loops"]["fit_loop"])
        held = checkpoint.get(structure.KEY, {}).get("held")
        if held:
            restore_gradient_masks(self.find_model(pl_module), held)

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been done, and the states of the random numbers."""
        records = {"done": to_plain(self.done), "kept": to_plain(self.baseline)}
        return {**records, "random": distributed.all_gather(random_states())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what had been done."""
        self.done = [CutRecord.from_dict(stored) for stored in state_dict["done"]]
        self.baseline = None if state_dict["kept"] is None else Baseline.from_dict(state_dict["kept"])
        self._random = state_dict["random"][distributed.rank()]


def _at(pl_module: LightningModule, path: str) -> Any:
    """What stands at a dotted path of a module; None where nothing does."""
    found: Any = pl_module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _train_on(trainer: Trainer) -> None:
    """Readies the Trainer for a model whose parameters are others: device, precision, optimizers and schedules."""
    strategy: Any = trainer.strategy
    strategy.model = strategy.precision_plugin.convert_module(strategy.lightning_module)
    strategy.model_to_device()
    _leave_masks_alone(strategy.lightning_module)
    if isinstance(strategy, DDPStrategy):  # its wrapper knows the parameters that were trained before
        strategy.configure_ddp()
    strategy.setup_optimizers(trainer)
    strategy.setup_precision_plugin()


def _leave_masks_alone(pl_module: LightningModule) -> None:
    """Lets DDP not send the masks of quantised weights in every step: all processes have the same, for good."""
    masks = [name for name, _ in pl_module.named_buffers() if name.rpartition(".")[2] == MASK]
    if masks:
        before = getattr(pl_module, "_ddp_params_and_buffers_to_ignore", [])  # a module of somebody's own may have some
        names = list(dict.fromkeys([*before, *masks]))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, names)
