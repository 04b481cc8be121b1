"""PrunableLM, the LightningModule around a Hugging Face causal LM.

The changes that pruning made to the LLM are recorded in its config (see ``structure``) and in every checkpoint; the LLM
is rebuilt from that record before a checkpoint's weights are loaded.
"""

from __future__ import annotations

import math
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
from lit_prune.progress import log
from lit_prune.recover import Snapshot
from lit_prune.recover.layers.float32 import adamw

Batch = dict[str, Tensor]


class PrunableLM(LightningModule):
    """LightningModule for a Hugging Face causal LM, trained with AdamW and evaluated by perplexity.

    Batches are dicts of `input_ids`, shape (batch, tokens), and optionally `attention_mask` (0 for padding), `labels`
    (-100 for tokens that the loss ignores) and `position_ids` (of packed conversations).
    Logs `train/loss` (nats per token), `val/perplexity` and `test/perplexity`.

    Args:
        pretrained: Hub id, folder or .gguf file of the model; `embedded` is the small model inside the package.
        architecture: Fields of a Hugging Face config (`model_type`, `hidden_size`, ...) for a model with random
            weights; `pretrained` then only names the tokenizer.
        dtype: Data type to load the weights in; `auto` is the type that they are stored in.
        attn_implementation: Attention implementation, such as `sdpa` or `eager`; null is transformers' default.
        on_disk: Keep the weights in the safetensors files of `pretrained` and load one block at a time, for models
            larger than memory; not for fit.
        trust_remote_code: Run Python code that comes with the model (and with its tokenizer), for families that
            transformers does not have; with false, such a model is refused. Read the code first: it can do anything.
        gradient_checkpointing: Save memory by recomputing activations in the backward pass.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW; not applied to norms and biases.
        betas: Betas of AdamW.
        warmup_steps: Number of linear warm-up steps, at the start and after every cut; null is 10, or a tenth of the
            steps until the next cut or the end if that is less.
        min_lr_share: Learning rate of the last step of the cosine, as a share of `lr`; with 0 that step changes
            nothing.

    Raises:
        InputError: if the model cannot be found, or an argument is out of its range.
    """

    def __init__(
        self,
        pretrained: str = "embedded",
        architecture: dict[str, Any] | None = None,
        dtype: Dtype = "auto",
        attn_implementation: str | None = None,
        on_disk: bool = False,
        trust_remote_code: bool = False,
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
            raise InputError("`model.on_disk` must be false with `model.architecture`, which has no weights on disk.")
        self.pretrained, self.architecture, self.dtype_of_weights = pretrained, architecture, dtype
        self.attn_implementation, self.gradient_checkpointing = attn_implementation, gradient_checkpointing
        self.on_disk, self.trust_remote_code = on_disk, trust_remote_code
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.warmup_steps, self.min_lr_share = warmup_steps, min_lr_share
        self.model: PreTrainedModel | None = None
        # a plain dict, since a ModuleDict would be cast to half precision with the module
        self.perplexity = {"val": Perplexity(), "test": Perplexity()}
        self.config = self._config()
        self._optimizer_step = 0
        self._set_up = False

    def _config(self) -> PreTrainedConfig:
        """Returns the LLM's config, which is checked before any weights are read."""
        if self.architecture is None:
            return load_config(self.pretrained, self.trust_remote_code)
        return architecture_config(self.architecture)

    def configure_model(self) -> None:
        """Loads or creates the LLM in the first call; under a sharding strategy, shards it in the call after `setup`.

        A DynamicPruningCallback makes the first call in its own `setup`, to cut the weights before they are sharded.
        Lightning then calls `setup` of this module and this again.
        """
        if self.model is None:
            self.model = self._loaded()
        mesh = self.device_mesh
        if mesh is not None and self._set_up and not is_sharded(self.model):
            shard(self.model, mesh["data_parallel"])

    def check_in_memory(self) -> None:
        """Raises InputError if the weights stay on disk, where they cannot be trained."""
        if self.on_disk:
            raise InputError(
                "`model.on_disk` must be false for fit, which keeps all weights in memory: prune first with "
                "`lit-prune prune --model.on_disk true`, and train the model that it writes."
            )

    def _loaded(self) -> PreTrainedModel:
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self.check_in_memory()
        if self.architecture is None:
            model = load_model(
                self.pretrained,
                self.dtype_of_weights,
                self.attn_implementation,
                self.on_disk,
                self.trust_remote_code,
            )
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
        """Returns the next-token cross entropy of a batch, in nats, averaged over the tokens with a label."""
        assert self.model is not None
        loss = self.model(**inputs_of(batch), labels=labels_of(batch), use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates `val/perplexity` with a batch."""
        self._update("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/perplexity`."""
        self._log_perplexity("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates `test/perplexity` with a batch."""
        self._update("test", batch)

    def on_test_epoch_end(self) -> None:
        """Logs `test/perplexity`."""
        self._log_perplexity("test")

    def _update(self, part: str, batch: Batch) -> None:
        metric = self.perplexity[part].to(self.device)
        metric.update(self(batch), batch["input_ids"], batch.get("attention_mask"), batch.get("labels"))

    def _log_perplexity(self, part: str) -> None:
        value = self.perplexity[part].compute()  # reduced over all processes by torchmetrics
        self.log(f"{part}/perplexity", value, prog_bar=True, sync_dist=True)
        self.perplexity[part].reset()

    def setup(self, stage: str) -> None:
        """Resets the step of the optimizer for a new run, and lets the next `configure_model` shard the LLM."""
        self._optimizer_step, self._set_up = 0, True

    def configure_optimizers(self) -> Any:
        """Returns AdamW over the trainable parameters, with a linear warm-up and a cosine over the remaining steps.

        If nothing says how many steps there are, the learning rate stays at its peak after the warm-up.
        """
        # Lightning calls this in `strategy.setup`, before a resumed run's loops are restored: `global_step` is still 0
        self._optimizer_step = max(self._optimizer_step, self.trainer.global_step)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = adamw([group for group in groups if group["params"]], lr=self.lr, betas=self.betas)
        end = self.trainer.estimated_stepping_batches  # infinite if only `max_time` ends the training
        if end == math.inf:
            log("The number of steps is not known: the learning rate stays at its peak after the warm-up.")
        warmup = warm_up_steps(self._until_cut(end)) if self.warmup_steps is None else self.warmup_steps
        steps = end - self._optimizer_step
        schedule = warm_up_and_cosine(optimizer, warmup=warmup, steps=steps, least=self.min_lr_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _until_cut(self, end: float) -> float:
        """Returns the number of steps from the optimizer's first to the next cut, or to ``end``."""
        begin, callbacks = self._optimizer_step, self.trainer.callbacks  # type: ignore[attr-defined]
        cuts = [step for callback in callbacks for step in getattr(callback, "cut_steps", ())]
        return min([end, *(step for step in cuts if step > begin)]) - begin

    def resume_settings(self) -> dict[str, Any]:
        """Returns the settings that a resumed run must share, by field."""
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
        """Adds the structure of the LLM and the step of the optimizer to the record in the checkpoint.

        Lightning calls the callbacks' hooks first, so the record of a DynamicPruningCallback is there, and is kept.
        """
        assert self.model is not None
        record = RunRecord.read_from(checkpoint)
        replace(record, snapshot=Snapshot.of(self.model), optimizer_step=self._optimizer_step).write_to(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuilds the LLM before Lightning loads the weights, unless a callback did so in its `setup`."""
        if self.on_disk:
            raise InputError("`model.on_disk` must be false with a checkpoint, whose weights are loaded into memory.")
        self.configure_model()
        assert self.model is not None
        resume = self._resume() or Resume(checkpoint)
        # strategies that shard load checkpoints after `strategy.setup`; the callback rebuilt the model before that
        if not is_sharded(self.model):
            resume.rebuild(self.model)
        self._optimizer_step = resume.record.optimizer_step or 0

    def _resume(self) -> Resume | None:
        """Returns the checkpoint that a callback has opened; None without such a callback, or without a Trainer."""
        callbacks = () if self._trainer is None else self._trainer.callbacks  # type: ignore[attr-defined]
        checkpoints = (getattr(callback, "resume", None) for callback in callbacks)
        return next((checkpoint for checkpoint in checkpoints if checkpoint is not None), None)
