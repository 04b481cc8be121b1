"""DynamicPruningCallback, which scores the blocks, allocates the sparsity, prunes and starts recovery during a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lit_prune.callbacks.best_scores import reset_best_scores
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.allocate import Allocation
from lit_prune.allocate.budget import Budget
from lit_prune.calibration.cached_statistics import read_statistics
from lit_prune.calibration.windows import Calibration
from lit_prune.checkpointing.position import begin_epoch, reload_training_data, settle_epoch
from lit_prune.checkpointing.record import RunRecord, Settings
from lit_prune.checkpointing.resume import Resume
from lit_prune.distill import Distillation
from lit_prune.distributed import shards_weights
from lit_prune.fit.fsdp import prepare_sharded
from lit_prune.fit.plan import FitPlan
from lit_prune.fit.preflight import check_fit, resume_settings
from lit_prune.fit.rewire import ignore_masks_in_ddp, rewire
from lit_prune.fit.run import PruningRun, attribute_at, find_model
from lit_prune.pipeline import prune
from lit_prune.progress import log
from lit_prune.pruning import Method
from lit_prune.random_states import random_states, restore_random_states
from lit_prune.recipe import Recipe, check_one_target
from lit_prune.reconstruct import Reconstruct
from lit_prune.recover import Recovery, freezes_zeros, restore_gradient_masks
from lit_prune.schedule import Cut, Schedule, cuts, shares


@runtime_checkable
class ChecksModel(Protocol):
    """A callback that refuses some models before any work, such as a ResultsCallback with a format of its own."""

    def check_model(self, trainer: Trainer, model: PreTrainedModel) -> None:
        """Raises InputError for a model that cannot be used, just loaded, with the Trainer's callbacks."""


class DynamicPruningCallback(Callback):
    """Prunes the Hugging Face LLM of a LightningModule during fit, and prepares it for recovery training.

    The LLM must be ``pl_module.model``, or at the path ``target``. Calibration windows come from the data module's
    ``calibration_windows(num_samples, seq_length, seed)`` if it has that method, else from the first batches of the
    training dataloader (dicts of `input_ids` and, with padding, `attention_mask`).

    At each cut the adapter is merged into the weights, the blocks are scored and pruned, and training goes on with a
    fresh adapter, optimizer and learning-rate schedule. With several cuts the sparsity rises from cut to cut.

    To resume a run, set ``trainer.ckpt_path = path`` before ``trainer.fit(...)``. A path that is passed to fit itself
    is not known in `setup`, which would then make a cut at step 0 again before the checkpoint's weights are loaded.

    Args:
        method: Pruning method: one that masks weights, such as Wanda or SparseGPT, or one that makes the LLM smaller,
            such as MLPWidth, HeadGroups, Shrink, HiddenWidth, Depth, Experts or Slicing; null prunes nothing, and
            `recovery` then trains the LLM as it is, with the weights that are already pruned kept at zero.
        sparsity: Share to remove, in [0, 1), as the mean over the blocks: of the weights of the linears (see `budget`),
            or for other methods of the channels, key/value groups, blocks, experts or dimensions. With several cuts,
            the share after the last one, or a list with one share per cut. null is 0.5, unless there is a target.
        target_parameters: Number of parameters that the last cut is to leave, such as 100M or 1.2B, instead of a
            `sparsity`; for methods that remove parameters, such as MLPWidth.
        target_bytes: Bytes that the exported weights are to take, such as 200MB, instead of a `sparsity`.
        target_perplexity: Perplexity on the validation batches that the LLM must not exceed right after the cut,
            instead of a `sparsity`: the greatest sparsity that keeps it is found to 0.01 by about eight cuts of copies.
        allocation: How the blocks are scored and the sparsity is distributed over them: DLP, OWL, AlphaPruning,
            LayerRedundancy, Arithmetic, Uniform, a Plan read from a file, or a Search over rates; null is DLP for masks
            and slices, and Uniform for methods that remove channels, groups, blocks, experts or dimensions.
        reconstruction: Reconstruct, the training of every block, right after it is cut, towards the output that it had
            before; null leaves the blocks as the method cuts them. For masks, MLPWidth, HeadGroups and Experts.
        at_step: Optimizer step before which to prune, or a list of steps for several cuts; 0 is the start of fit.
            Slicing allows one cut.
        schedule: How the sparsity rises over several cuts, Cubic or Linear; null is OneShot for one cut, Cubic for
            several.
        before: Recovery that trains the LLM up to a first cut after step 0, such as LoRA; null trains the parameters
            that the LightningModule leaves trainable (all, for PrunableLM), which must not include masked weights.
        recovery: How the LLM is trained after a cut, or from the start without `method`: LoRA, MaskedLoRA, QLoRA (one
            cut only) or FullFineTuning; null trains the parameters that the LightningModule leaves trainable, which
            must not include masked weights.
        distillation: Knowledge distillation with the LLM before its first cut as the teacher. The LightningModule must
            call the LLM with `labels` and train on the `loss` that it returns. null trains on the text alone.
        calibration: Calibration text of every cut.
        min_rate: Smallest share to remove from a block.
        max_rate: Largest share to remove from a block.
        targets: Linears to prune, as name suffixes or regular expressions; null prunes all linears of the blocks, which
            other methods require.
        ignore: Linears not to prune, as name suffixes or regular expressions.
        blocks: Dotted path of the decoder layers in the LLM, needed only where several lists of layers could be meant.
        budget: What `sparsity` is a share of: `linears`, what the method removes (weights of the linears, channels);
            `parameters`, all parameters of the LLM with tied weights counted once; or `bytes`, those of the exported
            weights. The latter two take a higher sparsity.
        statistics: Folder or file of the statistics that `lit-prune score` wrote for the same model and calibration
            text. A cut at step 0 reads them instead of running the model.
        target: Dotted path of the LLM in the LightningModule.
        measure: Measure perplexity before and after each cut, on the validation batches that the Trainer's
            `limit_val_batches` allows; if the method changes shapes, also tokens per second.
        keep_zeros: Whether zeros in the linears of an LLM that another tool pruned are a mask to keep; null raises an
            error if there are many and training would fill them.
        full_checkpoint: Store all weights in every checkpoint; otherwise frozen weights that can be restored from
            the model's source are left out.

    Raises:
        InputError: for settings that contradict each other.
    """

    def __init__(
        self,
        method: Method | None,
        sparsity: float | list[float] | None = None,
        allocation: Allocation | None = None,
        reconstruction: Reconstruct | None = None,
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
        target_parameters: int | str | None = None,
        target_bytes: int | str | None = None,
        target_perplexity: float | None = None,
        statistics: str | None = None,
        target: str = "model",
        measure: bool = True,
        keep_zeros: bool | None = None,
        full_checkpoint: bool = False,
    ) -> None:
        sizes: dict[str, Any] = {"target_parameters": target_parameters, "target_bytes": target_bytes}
        check_one_target(sparsity, **sizes, target_perplexity=target_perplexity)
        steps: tuple[Cut, ...] = ()
        recipe, final = None, 0.5 if sparsity is None else sparsity
        has_size = any(size is not None for size in sizes.values())
        if method is not None:
            has_target = has_size or target_perplexity is not None
            steps = shares(at_step, schedule) if has_target else cuts(at_step, final, schedule)
            # a size is turned into a sparsity once the LLM is known, and a perplexity when the cut is made
            share: Any = None if has_size else 0.0 if has_target else steps[-1].sparsity
            recipe = Recipe(
                method=method,
                sparsity=share,
                allocation=allocation,  # type: ignore[arg-type]  # None is the method's default
                min_rate=min_rate,
                max_rate=max_rate,
                targets=targets,
                ignore=ignore,
                blocks=blocks,
                budget=budget,
                reconstruction=reconstruction,
                **sizes,
            )
        self.fit_plan = FitPlan(
            recipe=recipe,
            cuts=steps,
            before=before,
            recovery=recovery,
            distillation=distillation,
            calibration=calibration,
            statistics=None if statistics is None else read_statistics(statistics),
            blocks=blocks,
            keep_zeros=keep_zeros,
            measure=measure,
            full_checkpoint=full_checkpoint,
            target_perplexity=target_perplexity,
        )
        self.run, self.target = PruningRun(self.fit_plan), target
        self.resume: Resume | None = None
        self._settings: Settings = {}
        self._random_states: dict[str, Any] | None = None
        self._freezes_zeros = self._is_between_epochs = False

    @property
    def cut_steps(self) -> tuple[int, ...]:
        """The optimizer steps before which cuts are made; PrunableLM limits its warm-up by them."""
        return self.fit_plan.steps

    def find_model(self, pl_module: LightningModule) -> PreTrainedModel:
        """Returns the LLM of a LightningModule; raises InputError if there is none at ``target``."""
        return find_model(pl_module, self.target)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes a cut that is due at step 0, or gives the LLM the structure of the checkpoint to resume from.

        Both replace parameters. Lightning calls, in this order, `setup`, `configure_model` (which may shard the
        parameters), `load_state_dict` (which needs their final shapes) and `strategy.setup` (which wraps the module for
        DDP and makes the optimizers), so `setup` is the only hook that is early enough.
        """
        if stage != "fit":
            self.resume = None
            return
        check_fit(self.fit_plan, trainer)
        self._settings = resume_settings(self.fit_plan, trainer, pl_module)
        self.resume = Resume.at(trainer.ckpt_path, self.resume)
        if self.resume is not None:
            self.resume.check_settings(self._settings)
            self.resume.check_end(trainer.max_steps)
        pl_module.configure_model()
        if self.fit_plan.idle and not isinstance(attribute_at(pl_module, self.target), PreTrainedModel):
            return
        model = self.find_model(pl_module)
        self.run.prepare(trainer, model, self.resume)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ChecksModel):
                callback.check_model(trainer, model)
        if self.resume is None:
            self.run.begin(trainer, model)
        if self.resume is None and self.run.is_due(0):
            with self.run.cutting(trainer, model) as cut:
                given = cut.inputs
                cut.pruned = prune(model, given.batches, given.recipe, device=given.device, statistics=given.statistics)
        self._freezes_zeros = freezes_zeros(model)
        ignore_masks_in_ddp(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reloads the training data of a resumed run; prepares a model that was sharded after `setup` for training."""
        reload_training_data(trainer)
        model = attribute_at(pl_module, self.target)
        if shards_weights(trainer) and isinstance(model, PreTrainedModel):
            prepare_sharded(trainer, model, freezes=self._freezes_zeros)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the random states of a checkpoint, or logs the sparsity after a cut that `setup` made.

        The states are restored here because everything before, such as making the dataloaders, draws random numbers.
        """
        self.resume = None  # frees the checkpoint, which may hold a teacher's weights
        if self._is_between_epochs:
            begin_epoch(trainer)
        self.run.check_teacher()
        if self._random_states is not None:
            restore_random_states(self._random_states)
        else:
            self.run.log_sparsity(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Makes the cut that is due, at the first of the batches whose gradients its step accumulates."""
        if not self.run.is_due(trainer.global_step):
            return
        log(f"Step {trainer.global_step}: cutting to {self.run.next_aim}")
        pl_module.zero_grad(set_to_none=True)
        model = self.find_model(pl_module)
        with self.run.cutting(trainer, model) as cut:
            given = cut.inputs
            cut.pruned = prune(model, given.batches, given.recipe, device=given.device, statistics=given.statistics)
        rewire(trainer)
        reset_best_scores(trainer)
        self.run.log_sparsity(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the terms of the distillation loss."""
        if self.run.teaching is not None:
            self.run.teaching.log(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if training ended before a planned cut."""
        self.run.warn_of_missing_cuts(trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the record of the run to the checkpoint, and drops the weights that the model's source has."""
        record = RunRecord(settings=self._settings)
        if not self.fit_plan.idle:
            model = self.find_model(pl_module)
            record = self.run.record(self._settings, model, checkpoint["state_dict"], f"{self.target}.")
        record.write_to(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the gradient masks, and corrects the epoch counters, which Lightning loads after this hook."""
        self._is_between_epochs = settle_epoch(checkpoint["loops"]["fit_loop"])
        masks = RunRecord.read_from(checkpoint).gradient_masks
        if masks:
            restore_gradient_masks(self.find_model(pl_module), masks)

    def state_dict(self) -> dict[str, Any]:
        """Returns the records of the cuts, and the random states of every process."""
        return {**self.run.state_dict(), "random_states": distributed.all_gather(random_states())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; Lightning calls this after `setup`."""
        self.run.load_state_dict(state_dict)
        self._random_states = state_dict["random_states"][distributed.rank()]
