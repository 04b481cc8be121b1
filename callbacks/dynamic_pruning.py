"""DynamicPruningCallback: at chosen steps it scores the blocks, allocates the sparsity, prunes, and starts recovery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lit_prune.callbacks.best_scores import reset_best_scores
from transformers import PreTrainedModel

from lit_prune import distributed
from lit_prune.allocate import DLP, Allocation
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
from lit_prune.prune import Method
from lit_prune.random_states import random_states, restore_random_states
from lit_prune.recipe import Recipe
from lit_prune.recover import Recovery, freezes_zeros, restore_gradient_masks
from lit_prune.schedule import Schedule, cuts


class DynamicPruningCallback(Callback):
    """Prunes the Hugging Face LLM of a LightningModule before chosen steps, and prepares it for recovery.

    The LLM is found as ``pl_module.model``. Calibration windows come from the data module's
    ``calibration_windows(num_samples, seq_length, seed)`` if it has that method, else from the first batches of the
    training dataloader (dicts of `input_ids` and, with padding, `attention_mask`).

    At a cut an adapter is folded into the weights, the blocks are scored and pruned, and a fresh adapter, optimizer and
    learning-rate schedule begin. Cuts at several steps reach rising targets.

    A run is resumed by ``trainer.ckpt_path = path`` before ``trainer.fit(...)``. A path that is passed to fit itself is
    unknown in `setup`, where a cut at step 0 is then made once more before the checkpoint's weights load.

    Args:
        method: How the blocks become smaller: by masks, such as Wanda or SparseGPT, or by Slicing; null cuts
            nothing: `recovery` then trains the LLM as it is, and weights that were pruned before stay pruned.
        sparsity: Share to remove, mean over the blocks, in [0, 1): of the linears' weights (see `budget`); for Slicing,
            of the dimensions of the residual stream. For several cuts the last one's, or a list with each one's.
        allocation: How blocks are scored and the sparsity is spread over them: DLP, OWL, AlphaPruning, LayerRedundancy,
            Uniform, a Plan from a file, or a Search that tries rates out; null is DLP.
        at_step: Optimizer step before which the cut comes, or a list of steps; 0 is the start of fit. Slicing makes
            one cut.
        schedule: How sparsity rises over several cuts, Cubic or Linear; null is OneShot for one cut, Cubic for several.
        before: What is trained before a first cut after step 0, such as LoRA; null trains what the LightningModule
            leaves trainable (all of PrunableLM), which must not be weights under a mask.
        recovery: What is trained after a cut, with a null `method` from the start: LoRA, MaskedLoRA, QLoRA (after the
            one cut) or FullFineTuning; null trains what the LightningModule leaves trainable, which must not be weights
            under a mask.
        distillation: The LLM as it is right before the first cut teaches the pruned one, by its own probabilities: the
            LLM must be called with `labels`, and trained on the `loss` that it returns. null trains on the text alone.
        calibration: How much text the statistics are taken over, at every cut.
        min_rate: Smallest share that is removed from any block.
        max_rate: Greatest share that is removed from any block.
        targets: Name suffixes or regular expressions of the linears to prune; null takes all in the blocks, and Slicing
            can do nothing else.
        ignore: Suffixes or regular expressions of linears to leave alone.
        blocks: Dotted path of the decoder layers in the LLM, for an unknown family.
        budget: What `sparsity` is a share of: `linears`, the weights that are pruned, or `parameters`, all parameters
            of the LLM, tied weights counted once; the linears' own sparsity is then higher.
        statistics: Folder or file that `lit-prune score` wrote for the same model and calibration text: a cut at step 0
            reads these statistics instead of running the model. Statistics of anything else are refused.
        target: Dotted path of the LLM in the LightningModule.
        measure: Measure the perplexity on the validation data before and after each cut (as much of it as the Trainer's
            `limit_val_batches` allows); for Slicing the tokens per second, too.
        keep_zeros: Keep the zeros in the linears of an LLM that another tool pruned, as a mask; null refuses an LLM
            with many zeros that training would fill.
        full_checkpoint: Store all weights in every checkpoint; else frozen weights that the LLM's source has, unchanged
            or under a mask, are left out.

    Raises:
        InputError: for settings that contradict each other, before any model is touched.
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
        steps = () if method is None else cuts(at_step, sparsity, schedule)
        recipe = None
        if method is not None:
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
            measure=measure,
            full_checkpoint=full_checkpoint,
        )
        self.run, self.target = PruningRun(self.fit_plan), target
        self.resume: Resume | None = None
        self._settings: Settings = {}
        self._random_states: dict[str, Any] | None = None
        self._freezes_zeros = self._is_between_epochs = False

    @property
    def cut_steps(self) -> tuple[int, ...]:
        """The optimizer steps before which cuts come; PrunableLM fits its warm-up to them."""
        return self.fit_plan.steps

    def find_model(self, pl_module: LightningModule) -> PreTrainedModel:
        """Returns the LLM of a LightningModule; raises InputError if there is none at ``target``."""
        return find_model(pl_module, self.target)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes a cut that is due at the start of fit, or rebuilds the LLM before a checkpoint's weights load.

        Both change parameters, and come before Lightning's `configure_model`, which may shard them, before it loads the
        weights, and before `strategy.setup`, which wraps them for DDP and makes the optimizers.
        """
        if stage != "fit":
            self.resume = None
            return
        check_fit(self.fit_plan, trainer)
        self._settings = resume_settings(self.fit_plan, trainer, pl_module)
        self.resume = Resume.at(trainer.ckpt_path, self.resume)
        if self.resume is not None:
            self.resume.check_settings(self._settings)
        pl_module.configure_model()
        if self.fit_plan.idle and not isinstance(attribute_at(pl_module, self.target), PreTrainedModel):
            return
        model = self.find_model(pl_module)
        self.run.start(trainer, model, self.resume)
        if self.resume is None and self.run.is_due(0):
            with self.run.cutting(trainer, model) as cut:
                given = cut.inputs
                cut.pruned = prune(model, given.batches, given.recipe, device=given.device, statistics=given.statistics)
        self._freezes_zeros = freezes_zeros(model)
        ignore_masks_in_ddp(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a resumed run read on in its data; prepares a model that was sharded since it was cut."""
        reload_training_data(trainer)
        model = attribute_at(pl_module, self.target)
        if shards_weights(trainer) and isinstance(model, PreTrainedModel):
            prepare_sharded(trainer, model, freezes=self._freezes_zeros)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the random numbers of a checkpoint back, after everything that draws some; logs an earlier cut."""
        self.resume = None  # a teacher's weights in it need not stay
        if self._is_between_epochs:
            begin_epoch(trainer)
        self.run.check_teacher()
        if self._random_states is not None:
            restore_random_states(self._random_states)
        else:
            self.run.log_sparsity(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Makes the cut that is due: the step is reached at the first batch of its window of accumulated gradients."""
        if not self.run.is_due(trainer.global_step):
            return
        log(f"Step {trainer.global_step}: cutting to a sparsity of {self.run.next_sparsity:.4g}")
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
        """Logs the parts of the loss under distillation."""
        if self.run.teaching is not None:
            self.run.teaching.log(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns where training ended before a cut."""
        self.run.warn_of_missing_cuts(trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores the run's settings and what the LLM was made into; leaves out weights that its source has."""
        record = RunRecord(settings=self._settings)
        if not self.fit_plan.idle:
            model = self.find_model(pl_module)
            record = self.run.record(self._settings, model, checkpoint["state_dict"], f"{self.target}.")
        record.write_to(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the gradient masks; Lightning has loaded the weights by now, and loads its loops after this."""
        self._is_between_epochs = settle_epoch(checkpoint["loops"]["fit_loop"])
        masks = RunRecord.read_from(checkpoint).gradient_masks
        if masks:
            restore_gradient_masks(self.find_model(pl_module), masks)

    def state_dict(self) -> dict[str, Any]:
        """Returns what was done, and the states of the random numbers of every process."""
        return {**self.run.state_dict(), "random_states": distributed.all_gather(random_states())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; `setup` comes before this, so it knows no cuts."""
        self.run.load_state_dict(state_dict)
        self._random_states = state_dict["random_states"][distributed.rank()]
