"""Cases of training: fits on a device, compared with the same fit on the CPU in float32."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from lit_prune.callbacks import DynamicPruningCallback, RunCheckpoint

from benchmarks.gpu.case import Case, Row, Settings, WrongResultError, now
from lit_prune.allocate import Uniform
from lit_prune.calibration.windows import Calibration
from lit_prune.cli.main import main as run_command
from lit_prune.distill import Copy, Distillation, SparseDelta, TopK
from lit_prune.evaluation.perplexity import measure
from lit_prune.fit.module import PrunableLM
from lit_prune.models.load import Dtype
from lit_prune.pruning import Wanda
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA, Recovery

# types of the weights and precisions of the Trainer
HALVES: tuple[tuple[Dtype, str], ...] = (
    ("bfloat16", "32-true"),
    ("float16", "32-true"),
    ("float32", "bf16-mixed"),
    ("float32", "16-mixed"),
)


class _Meter(Callback):
    """Measures the tokens per second after the first step, and the perplexity at the end of the training."""

    def __init__(self) -> None:
        self.tokens, self.begin, self.row = 0, 0.0, {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock before the second step, since the first one warms up."""
        if trainer.global_step == 1 and not self.begin:
            self.begin = now(pl_module.device)
        if self.begin:
            self.tokens += batch["input_ids"].numel()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measures on the device, before Lightning moves the model to the CPU."""
        seconds = now(pl_module.device) - self.begin
        found = measure(pl_module.model, trainer.datamodule.val_dataloader(), "").perplexity
        self.row = {"perplexity": found, "tokens_per_second": self.tokens / seconds}


@final
@dataclass(frozen=True)
class Fit(Case):
    """A fit that cuts with Wanda, recovers and measures the perplexity on the device.

    Its reference is the same fit on the CPU, in float32.
    """

    recovery: Recovery
    dtype: Dtype = "float32"
    precision: str = "32-true"
    sharded: bool = False
    compiled: bool = False
    distillation: Distillation | None = None
    tolerance: float = 2e-2

    @property
    def name(self) -> str:
        """The recovery, and what is unusual about the fit."""
        parts = [type(self.recovery).__name__]
        if isinstance(self.recovery, QLoRA):
            parts.append(self.recovery.quantization)
        parts += [] if self.dtype == "float32" else [f"weights in {self.dtype}"]
        parts += [] if self.precision == "32-true" else [self.precision]
        parts += ["FSDP2"] if self.sharded else []
        parts += ["torch.compile"] if self.compiled else []
        parts += [f"distilled, {self.distillation.teacher}"] if self.distillation else []
        return ", ".join(parts)

    @property
    def reference(self) -> Case:  # type: ignore[override]
        """The same recovery in float32, by the simplest means."""
        return replace(self, dtype="float32", precision="32-true", sharded=False, compiled=False)

    def run(self, settings: Settings, device: torch.device) -> Row:
        """Runs the fit."""
        seed_everything(0, verbose=False)
        module = self.module(settings)
        data, meter = settings.data(), _Meter()
        trainer = self.trainer(settings, device, [self.pruning(settings), meter])
        trainer.fit(module, data)
        return meter.row

    def module(self, settings: Settings) -> PrunableLM:
        """Returns the module to train."""
        module = PrunableLM(settings.pretrained, dtype=self.dtype, lr=5e-4, warmup_steps=2)
        if self.compiled:
            module.configure_model()
            assert module.model is not None
            module.model.compile(backend=settings.compiler)
        return module

    def pruning(self, settings: Settings) -> DynamicPruningCallback:
        """Returns the callback that prunes at the start."""
        return DynamicPruningCallback(
            method=Wanda(),
            sparsity=settings.sparsity,
            allocation=Uniform(),
            recovery=self.recovery,
            distillation=self.distillation,
            calibration=Calibration(settings.num_samples, settings.seq_length, batch_size=settings.batch_size),
        )

    def trainer(self, settings: Settings, device: torch.device, callbacks: list[Callback]) -> Trainer:
        """Returns a silent Trainer."""
        sharding = {"data_parallel_size": 1, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
        return Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1,
            strategy=ModelParallelStrategy(**sharding) if self.sharded else "auto",  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            max_steps=settings.steps,
            callbacks=callbacks,
            limit_val_batches=1.0,
            val_check_interval=None,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=any(isinstance(callback, RunCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )


class _StoppedError(Exception):
    """The end of a run that is resumed afterwards."""


class _Stop(Callback):
    """Ends a run in mid-step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Raises before the given step."""
        if trainer.global_step == self.step:
            raise _StoppedError


@final
@dataclass(frozen=True)
class Resumed(Case):
    """A fit that is stopped half-way and resumed, compared with the same fit that is not stopped.

    Dropout makes them equal only if the states of the device's random numbers are restored too.
    """

    fit: Fit = Fit(MaskedLoRA(dropout=0.1))
    tolerance: float = 1e-5

    @property
    def name(self) -> str:
        """The recovery."""
        return f"{self.fit.name} with dropout, stopped and resumed"

    def run(self, settings: Settings, device: torch.device) -> Row:
        """Runs the fit three times: whole, up to half of its steps, and from there."""
        half, perplexities = settings.steps // 2, []
        with tempfile.TemporaryDirectory() as folder:
            for stop, resume in ((None, None), (half, None), (None, Path(folder) / "last.ckpt")):
                seed_everything(0, verbose=False)
                meter, checkpoint = _Meter(), RunCheckpoint(folder, every_n_steps=half)
                callbacks = [self.fit.pruning(settings), meter, *([checkpoint] if stop else [])]
                trainer = self.fit.trainer(settings, device, [*callbacks, *([_Stop(stop)] if stop else [])])
                trainer.ckpt_path = resume
                with suppress(_StoppedError):
                    trainer.fit(self.fit.module(settings), settings.data())
                perplexities.append(meter.row.get("perplexity"))
        whole, _, resumed = perplexities
        return {"perplexity": resumed, "expected": whole, "note": "compared with the run that was not stopped"}


@final
@dataclass(frozen=True)
class Command(Case):
    """`lit-prune fit`, whose exported folder is opened again and verified."""

    options: Sequence[str]

    @property
    def name(self) -> str:
        """The options."""
        return " ".join(["lit-prune fit", *self.options])

    def run(self, settings: Settings, device: torch.device) -> Row:
        """Runs the command in this process."""
        fields = {
            "model.pretrained": settings.pretrained,
            "data.train_files": settings.train_files or "null",
            "data.val_files": settings.val_files or "null",
            "data.seq_length": settings.seq_length,
            "data.batch_size": settings.batch_size,
            "data.val_windows": settings.val_windows,
            "pruning.calibration.num_samples": settings.num_samples,
            "pruning.calibration.seq_length": settings.seq_length,
            "trainer.accelerator": "gpu" if device.type == "cuda" else device.type,
            "trainer.max_steps": settings.steps,
            "trainer.limit_val_batches": 1.0,
        }
        with tempfile.TemporaryDirectory() as folder:
            arguments = [f"--{name}={value}" for name, value in fields.items()]
            run_command(["fit", f"--output={folder}/run", "--model.dtype=float32", *arguments, *self.options])
            report = json.loads((Path(folder) / "run" / "report.json").read_text())
        if not report["export"]["verified"]:
            raise WrongResultError("the exported folder is not the model in memory")
        return {"perplexity": report["perplexity"]["recovered"], "note": "exported, opened again and verified"}


def cases() -> list[Case]:
    """Returns the cases of training."""
    quantised = [Fit(QLoRA(quantization=kind)) for kind in ("nf4", "fp4", "int8")]
    halves = [
        Fit(recovery, dtype, precision)
        for recovery in (LoRA(), MaskedLoRA(), FullFineTuning())
        for dtype, precision in HALVES
    ]
    sharded = [Fit(recovery, sharded=True, tolerance=2e-3) for recovery in (MaskedLoRA(), FullFineTuning())]
    sharded.append(Fit(FullFineTuning(), "bfloat16", sharded=True))
    compiled = [Fit(recovery, compiled=True, tolerance=2e-3) for recovery in (MaskedLoRA(), FullFineTuning())]
    teachers = [Copy(), Copy("nf4"), SparseDelta(), TopK()]
    distilled = [Fit(MaskedLoRA(), distillation=Distillation(teacher=teacher)) for teacher in teachers]
    exported = [
        Command(["--pruning.recovery=QLoRA", f"--pruning.recovery.quantization={kind}"]) for kind in ("nf4", "int8")
    ]
    return [Fit(MaskedLoRA()), *quantised, *halves, *sharded, *compiled, *distilled, Resumed(), *exported]
