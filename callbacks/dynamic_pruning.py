"""DynamicPruningCallback: scores the blocks, decides what each gives, prunes at the start of fit, attaches recovery."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision
from lit_prune.callbacks.batches import calibration_batches, check_processes, named, validation_data
from transformers import PreTrainedModel

from lit_prune import structure
from lit_prune.allocate import DLP, Allocation
from lit_prune.budget import Budget
from lit_prune.calibrate import Batch, Calibration
from lit_prune.errors import InputError
from lit_prune.evaluate import measure, parameters, size_bytes
from lit_prune.families import Block
from lit_prune.on_disk import placed
from lit_prune.pipeline import Recipe, check_stored, prune, recipe_record
from lit_prune.prune import Method
from lit_prune.recover import Recovery, rebuild, snapshot
from lit_prune.speed import tokens_per_second
from lit_prune.stored import read_stored


class DynamicPruningCallback(Callback):
    """Prunes the Hugging Face LLM of a LightningModule before the first step, and readies it for recovery.

    The LLM is found as ``pl_module.model``. Calibration windows come from the data module's
    ``calibration_windows(num_samples, seq_length, seed)`` where it has one, else from the first batches of the training
    dataloader (dicts of `input_ids` and, where there is padding, `attention_mask`).

    A run is resumed by ``trainer.ckpt_path = path`` before ``trainer.fit(...)``: a path that is passed to fit itself is
    known only after the cut, which is then done once more before the checkpoint's weights load.

    Args:
        method: How the blocks become smaller: by masks, such as Wanda or SparseGPT, or by Slicing; null switches
            pruning off.
        sparsity: Share to remove, mean over the blocks, in [0, 1): of the linears' weights (see `budget`); for Slicing,
            of the dimensions of the residual stream.
        allocation: How blocks are scored and the sparsity is spread over them: DLP, OWL, AlphaPruning, LayerRedundancy,
            Uniform, a Plan from a file, or a Search that tries rates out; null is DLP.
        at_step: Optimizer step before which the cut comes; 0 is the only one so far.
        recovery: What is trained after the cut: LoRA, MaskedLoRA or FullFineTuning; null trains what the
            LightningModule leaves trainable, which must not be weights under a mask.
        calibration: How much text the statistics are taken over.
        min_rate: Least share that any block gives.
        max_rate: Greatest share that any block gives.
        targets: Name suffixes or regular expressions of the linears to prune; null takes all in the blocks, and Slicing
            can do nothing else.
        ignore: Suffixes or regular expressions of linears to leave alone.
        blocks: Dotted path of the decoder layers in the LLM, for a family that is not known.
        budget: What `sparsity` is a share of: `linears`, the weights that are pruned, or `parameters`, all parameters
            of the LLM, tied weights counted once, of which the linears then give more than that share.
        statistics: Folder or file that `lit-prune score` wrote for the same model and calibration text: the cut reads
            its statistics in place of a pass of its own. What differs is refused.
        target: Dotted path of the LLM in the LightningModule.
        measure: Measure the perplexity on the validation data before and after the cut (as much of it as the Trainer's
            `limit_val_batches` allows); for Slicing the tokens per second, too.

    Raises:
        InputError: for settings that cannot be; before anything is touched.
    """

    def __init__(
        self,
        method: Method | None,
        sparsity: float = 0.5,
        allocation: Allocation | None = None,
        at_step: int = 0,
        recovery: Recovery | None = None,
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
    ) -> None:
        if at_step != 0:
            raise InputError(f"`pruning.at_step` must be 0, the start of fit, got {at_step}; later steps are to come.")
        self.recipe: Recipe | None = None
        if method is not None:
            self.recipe = Recipe(
                method=method,
                sparsity=sparsity,
                allocation=allocation or DLP(),
                min_rate=min_rate,
                max_rate=max_rate,
                targets=targets,
                ignore=ignore,
                blocks=blocks,
                budget=budget,
            )
        self.recovery, self.calibration = recovery, calibration
        self.stored = None if statistics is None else read_stored(statistics)
        self.target, self.measure = target, measure
        self.done: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prunes at the start of fit, or rebuilds what was done before a checkpoint's weights load."""
        if self.recipe is None or stage != "fit":
            return
        check_processes(trainer)
        pl_module.configure_model()
        model = self.find_model(pl_module)
        if trainer.ckpt_path:
            rebuild(model, self.checkpointed(str(trainer.ckpt_path)))
            return
        if isinstance(trainer.precision_plugin, HalfPrecision):
            trainer.precision_plugin.convert_module(model)
        self._check_trained(self.recipe.check(model))
        if self.recovery is not None:
            self.recovery.check(model)
        calibration = calibration_batches(trainer, self.calibration)
        self.check_statistics(model, *calibration)
        self.cut(model, calibration, validation_data(trainer), trainer.strategy.root_device)
        if self.recovery is not None:
            self.recovery.attach(model)
            structure.write(model, recovery=repr(self.recovery))

    def check_statistics(self, model: PreTrainedModel, batches: list[Batch], settings: dict[str, Any]) -> None:
        """Raises InputError where the statistics that were stored are not those of this model and this text."""
        if self.stored is not None and self.recipe is not None:
            check_stored(self.stored, model, batches, self.recipe, named(settings, model))

    def cut(
        self,
        model: PreTrainedModel,
        calibration: tuple[list[Batch], dict[str, Any]],
        validation: tuple[Iterable[Batch], str] | None,
        device: torch.device,
    ) -> None:
        """Measures, prunes ``model`` and measures again; keeps the numbers in ``done``."""
        assert self.recipe is not None
        batches, settings = calibration
        done: dict[str, Any] = {"perplexity": {}, "seconds": {}, "protocol": None, "calibration": settings, "size": {}}

        def measured(name: str) -> None:
            if self.measure and validation is not None:
                measurement = measure(placed(model, device), *validation, label=f"Perplexity, {name}", device=device)
                done["perplexity"][name] = measurement.perplexity
                done["seconds"][f"perplexity_{name}"] = measurement.seconds
                done["protocol"] = measurement.protocol
            if self.recipe is not None and self.recipe.method.changes_shapes:
                speed = tokens_per_second(placed(model, device)) if self.measure else None
                done["size"][name] = {"parameters": parameters(model), "bytes": size_bytes(model), "speed": speed}

        measured("dense")
        pruned = prune(model, batches, self.recipe, device=device, stored=self.stored)
        done["seconds"] |= pruned.seconds
        measured("pruned")
        self.done = done | {
            "recipe": recipe_record(self.recipe),
            "scores": pruned.scores,
            "rates": pruned.rates,
            "target": pruned.target,
            "achieved": pruned.achieved,
            "sparsity": pruned.sparsity,
            "search": pruned.search,
        }

    def find_model(self, pl_module: LightningModule) -> PreTrainedModel:
        """Returns the LLM of a LightningModule.

        Raises:
            InputError: if there is none at ``target``.
        """
        found: Any = pl_module
        for name in self.target.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, PreTrainedModel):
            raise InputError(
                f"`pruning.target` must be the attribute of {type(pl_module).__name__} that holds a Hugging Face "
                f"model, `{self.target}` is {type(found).__name__}. It must be there once `configure_model` was called."
            )
        return found

    def checkpointed(self, path: str) -> dict[str, Any]:
        """Returns what a checkpoint says was done to the LLM.

        Raises:
            InputError: if it is no checkpoint of a fit, or not what this run would do was done.
        """
        assert self.recipe is not None
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(structure.KEY)
        except Exception as error:  # torch raises a dozen kinds for a file that is none of its own
            raise InputError(f"`ckpt_path` must be a checkpoint of a fit, {path} cannot be read as one.") from error
        record = (stored or {}).get("record", {})
        if "recipe" not in record:
            raise InputError(f"`ckpt_path` must be a checkpoint of a pruned model, nothing was pruned in {path}.")
        recovery = self.recovery and repr(self.recovery)
        defaults = recipe_record(Recipe())  # an older record lacks settings that there were none of
        done = {**defaults, **record["recipe"], "recovery": record.get("recovery")}
        for field, value in {**recipe_record(self.recipe), "recovery": recovery}.items():
            if done[field] != value:
                raise InputError(
                    f"`pruning.{field}` must be what the checkpoint was made with, {done[field]}, got {value}; "
                    "change it back, or begin a new run."
                )
        return stored

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

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores what the LLM was made into, where the LightningModule has not."""
        if self.recipe is not None:
            checkpoint.setdefault(structure.KEY, snapshot(self.find_model(pl_module)))

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been done."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what had been done."""
        self.done = state_dict["done"]
