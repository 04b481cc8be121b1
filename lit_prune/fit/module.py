"""PrunableLM, the LightningModule around a Hugging Face causal LM.

It owns the LLM. What was done to the LLM stands in its config (see ``structure``) and in every checkpoint, and the LLM
is rebuilt from it before a checkpoint's weights are loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lit_prune.calibration.windows import inputs_of
from lit_prune.checkpointing.record import RunRecord
from lit_prune.checkpointing.resume import Resume
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import Perplexity, labels_of
from lit_prune.fit.fsdp import is_sharded, shard
from lit_prune.fit.learning_rate import warm_up_and_cosine, warm_up_steps
from lit_prune.models.load import Dtype, architecture_config, load_config, load_model, new_model
from lit_prune.recover import Snapshot
from lit_prune.recover.float32 import adamw

Batch = dict[str, Tensor]


class PrunableLM(LightningModule):
    """A causal LM with its loss, its optimizer and its perplexity.

    Batches are dicts with `input_ids` (batch, tokens); where there is padding, `attention_mask`; where not every token
    is to be learnt, `labels`, -100 for those that are not; where conversations are packed, `position_ids`.
    Logs `train/loss` (nats a token), `val/perplexity` and `test/perplexity`.

    Args:
        pretrained: Hub id, folder, .gguf file, or `embedded`, the small model inside the package.
        architecture: Fields of a Hugging Face config (`model_type`, `hidden_size`, ...) for a model that starts from
            random weights; `pretrained` then only names the tokenizer.
        dtype: Data type of the weights; `auto` takes the one they are stored in.
        attn_implementation: `sdpa`, `eager`, ...; null takes transformers' choice.
        on_disk: Leave the weights in the safetensors of `pretrained`, one block at a time in memory, for models that
            are bigger than it; for the verbs that do not train.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of matrices; vectors (norms, biases) have none.
        betas: AdamW's coefficients.
        warmup_steps: Optimizer steps of linear warm-up, at the start and after every cut; null is 10, but at most a
            tenth of the steps until the next cut or the end.
        min_lr_share: Share of `lr` that the cosine gives the last step; with 0 that step changes nothing.

    Raises:
        InputError: if the model cannot be found, or a number is out of its range.
    """

    def __init__(
        self,
        pretrained: str = "embedded",
        architecture: dict[str, Any] | None = None,
        dtype: Dtype = "auto",
        attn_implementation: str | None = None,
        on_disk: bool = False,
        gradient_checkpointing: bool = False,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int | None = None,
        min_lr_share: float = 0.1,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise InputError(f"`model.lr` must be above 0, got {lr}.")
        if warmup_steps is not None and warmup_steps < 0:
            raise InputError(f"`model.warmup_steps` must be at least 0, got {warmup_steps}.")
        if on_disk and architecture is not None:
            raise InputError("`model.on_disk` must be false with `model.architecture`, whose weights are in no file.")
        self.pretrained, self.architecture, self.dtype_of_weights = pretrained, architecture, dtype
        self.attn_implementation, self.gradient_checkpointing = attn_implementation, gradient_checkpointing
        self.on_disk = on_disk
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.warmup_steps, self.min_lr_share = warmup_steps, min_lr_share
        self.model: PreTrainedModel | None = None
        self.perplexity = {
            "val": Perplexity(),
            "test": Perplexity(),
        }  # a dict, not a ModuleDict: half precision must not cast them
        self.config = self._config()
        self._optimizer_step = 0
        self._set_up = False

    def _config(self) -> PreTrainedConfig:
        """Returns the LLM's config alone, so that what depends on it is checked before weights are read."""
        return load_config(self.pretrained) if self.architecture is None else architecture_config(self.architecture)

    def configure_model(self) -> None:
        """Loads the LLM, or makes a fresh one; shards it in the call after `setup`, where the strategy does.

        A DynamicPruningCallback calls it first, in its own `setup`, and cuts whole weights before Lightning's call.
        """
        if self.model is None:
            self.model = self._loaded()
        mesh = self.device_mesh
        if mesh is not None and self._set_up and not is_sharded(self.model):
            shard(self.model, mesh["data_parallel"])

    def _loaded(self) -> PreTrainedModel:
        if self.on_disk and self._trainer is not None and self.trainer.state.fn == "fit":
            raise InputError(
                "`model.on_disk` must be false for fit, training keeps all weights in memory: prune first by "
                "`lit-prune prune --model.on_disk true`, and train what that writes."
            )
        if self.architecture is None:
            model = load_model(self.pretrained, self.dtype_of_weights, self.attn_implementation, self.on_disk)
        else:
            model = new_model(self.architecture, self.dtype_of_weights)
        model.train()
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable()
        return model

    def forward(self, batch: Batch) -> Tensor:
        """Returns the logits, shape (batch, tokens, vocabulary)."""
        assert self.model is not None
        return self.model(**inputs_of(batch), use_cache=False).logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the mean next-token cross entropy of a batch (nats), over the predictions that count."""
        assert self.model is not None
        loss = self.model(**inputs_of(batch), labels=labels_of(batch), use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to `val/perplexity`."""
        self._update("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/perplexity`."""
        self._log_perplexity("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to `test/perplexity`."""
        self._update("test", batch)

    def on_test_epoch_end(self) -> None:
        """Logs `test/perplexity`."""
        self._log_perplexity("test")

    def _update(self, part: str, batch: Batch) -> None:
        metric = self.perplexity[part].to(self.device)
        metric.update(self(batch), batch["input_ids"], batch.get("attention_mask"), batch.get("labels"))

    def _log_perplexity(self, part: str) -> None:
        value = self.perplexity[part].compute()  # over all processes
        self.log(f"{part}/perplexity", value, prog_bar=True, sync_dist=True)
        self.perplexity[part].reset()

    def setup(self, stage: str) -> None:
        """Resets the step of the optimizer, which a checkpoint may change; lets the next call shard the LLM."""
        self._optimizer_step, self._set_up = 0, True

    def configure_optimizers(self) -> Any:
        """Returns AdamW over what is trained, with linear warm-up and a cosine over the steps that remain."""
        # a resumed Trainer asks for this in `strategy.setup`, before its loops are restored: it still counts from 0
        self._optimizer_step = max(self._optimizer_step, self.trainer.global_step)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = adamw([group for group in groups if group["params"]], lr=self.lr, betas=self.betas)
        end = int(self.trainer.estimated_stepping_batches)
        warmup = warm_up_steps(self._until_cut(end)) if self.warmup_steps is None else self.warmup_steps
        steps = end - self._optimizer_step
        schedule = warm_up_and_cosine(optimizer, warmup=warmup, steps=steps, least=self.min_lr_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _until_cut(self, end: int) -> int:
        """Returns the steps from the one at which the optimizer is made to the next cut, or to ``end``."""
        begin, callbacks = self._optimizer_step, self.trainer.callbacks  # type: ignore[attr-defined]
        cuts = [step for callback in callbacks for step in getattr(callback, "cut_steps", ())]
        return min([end, *(step for step in cuts if step > begin)]) - begin

    def resume_settings(self) -> dict[str, Any]:
        """Returns the settings that a resumed run must have again, by field."""
        fields = {
            "architecture": self.architecture,
            "dtype": self.dtype_of_weights,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "betas": list(self.betas),
            "warmup_steps": self.warmup_steps,
            "min_lr_share": self.min_lr_share,
        }
        return {f"model.{field}": value for field, value in fields.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the structure of the LLM beside its weights, and the step at which the optimizer was made.

        Lightning calls the callbacks first: what a DynamicPruningCallback has put into the record stays.
        """
        assert self.model is not None
        record = RunRecord.read_from(checkpoint)
        replace(record, snapshot=Snapshot.of(self.model), optimizer_step=self._optimizer_step).write_to(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuilds the LLM before Lightning loads the weights, unless a callback's `setup` has done so in a fit."""
        if self.on_disk:
            raise InputError("`model.on_disk` must be false where a checkpoint is loaded, whose weights are in memory.")
        self.configure_model()
        assert self.model is not None
        resume = self._resume() or Resume(checkpoint)
        if not is_sharded(self.model):  # a sharded one has its weights by now, and was rebuilt before it was sharded
            resume.rebuild(self.model)
        self._optimizer_step = resume.record.optimizer_step or 0

    def _resume(self) -> Resume | None:
        """Returns the checkpoint that a callback has opened; None where there is no such callback, or no Trainer."""
        callbacks = () if self._trainer is None else self._trainer.callbacks  # type: ignore[attr-defined]
        opened = (getattr(callback, "resume", None) for callback in callbacks)
        return next((resume for resume in opened if resume is not None), None)
