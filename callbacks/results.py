"""ResultsCallback: writes the results of a run into its folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lit_prune.callbacks.dynamic_pruning import DynamicPruningCallback
from lit_prune.callbacks.loggers import log_results
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune import distributed
from lit_prune.data.batches import validation_data
from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import Measurement, measure
from lit_prune.evaluation.tasks import Tasks
from lit_prune.export.data_type import export_dtype, stored_dtype
from lit_prune.export.formats import ExportFormat, HuggingFace
from lit_prune.export.hub import check_repository, push
from lit_prune.export.plan import ExportPlan, Outline
from lit_prune.export.run_folder import RunFolder
from lit_prune.export.verify import check_trained
from lit_prune.files import write_text
from lit_prune.fit.fsdp import gathered, is_sharded
from lit_prune.progress import log
from lit_prune.report.report import Report
from lit_prune.report.summary import last_name, summary
from lit_prune.report.table import table
from lit_prune.report.write import Validation, write_results, write_tasks
from lit_prune.target import StoredBytes

AnyCallback = TypeVar("AnyCallback", bound=Callback)


class ResultsCallback(Callback):
    """Writes the model folder, report.json and the picture at the end of fit, and prints the table.

    It exports the LLM of the DynamicPruningCallback, which must be in the list of callbacks too, and reports its
    records. It comes before that callback, so that a folder that may not be replaced is refused before the cut.

    Args:
        output: Folder to write to. It is created after the cut, so that a run that is refused leaves nothing.
        overwrite: Replace an existing folder; it is moved aside until this run has succeeded.
        config: Text of the run's configuration, written as config.yaml.
        csv_log: Log metrics to `logs/` in the folder if the Trainer has no logger. (A logger given to the Trainer
            would create its files before anything is checked.)
        push_to_hub: Repository on the Hugging Face hub to upload the model folder to.
        format: Format of the model folder; null is HuggingFace.
        dtype: Data type of the exported weights; null is that of the files that the model was loaded from, if it was
            trained in a wider one, and else the one that it was trained in.
        tasks: Tasks of lm-eval that are run at the end, for report.json and the model card. They need the tokenizer of
            the data module.

    Raises:
        InputError: if the folder exists and may not be replaced, or cannot be written to; if `push_to_hub` is not a
            valid id; if the format cannot hold the model.
    """

    def __init__(
        self,
        output: str,
        overwrite: bool = False,
        config: str | None = None,
        csv_log: bool = False,
        push_to_hub: str | None = None,
        tasks: Tasks | None = None,
        format: ExportFormat | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        if push_to_hub is not None:
            check_repository(push_to_hub)
        self.folder = RunFolder(output, overwrite=overwrite)
        self.config, self.csv_log, self.push_to_hub = config, csv_log, push_to_hub
        self.tasks, self._checked = tasks, False
        self.format = HuggingFace() if format is None else format
        self.dtype = dtype
        self._stored: torch.dtype | None = None
        self.seconds = 0.0
        self._started = 0.0
        self._csv: CSVLogger | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the folder and the tasks, before the DynamicPruningCallback cuts."""
        if stage == "fit":
            find_callback(trainer, DynamicPruningCallback)  # raises an error if there is none
            self.folder.resume = self.folder.holds(trainer.ckpt_path)
            if distributed.is_rank_zero():
                self.folder.check()
                self.check_tasks(getattr(trainer.datamodule, "tokenizer", None))  # type: ignore[attr-defined]
            # some callbacks need a logger in their own `setup`; this one creates no file before it logs
            if self.csv_log and trainer.logger is None:
                trainer.logger = self._csv = CSVLogger(self.folder.path, name="logs")

    def check_model(self, trainer: Trainer, model: PreTrainedModel) -> None:
        """Checks the format; the DynamicPruningCallback calls this once the model is loaded, before any work."""
        self.check_format(find_callback(trainer, DynamicPruningCallback), model)
        self.format.check_model(model, getattr(trainer.datamodule, "tokenizer", None))  # type: ignore[attr-defined]

    def check_format(
        self, pruning: DynamicPruningCallback, model: PreTrainedModel, *, trains: bool = True, on_disk: bool = False
    ) -> None:
        """Checks that the format can hold what a cut and a recovery will make of ``model``, before either is done.

        Without a cut nothing is known from a model without weights: only they tell whether zeros are to be kept.

        Args:
            pruning: The callback that cuts.
            model: The model before the cut; it may be on the meta device.
            trains: Whether a recovery follows the cut.
            on_disk: Whether the weights stay on disk.

        Raises:
            InputError: if the format cannot hold it.
        """
        if pruning.fit_plan.recipe is None and model.device.type == "meta":
            return
        recovery = pruning.fit_plan.recovery if trains else None
        outline = Outline.expected(model, pruning.fit_plan.recipe, recovery, on_disk=on_disk)
        if outline is not None:
            self.format.check(outline)

    def check_tasks(self, tokenizer: Tokenizer | None, *, load: bool = True) -> None:
        """Checks, once per run, that the tasks can be run; reads their data too, unless ``load`` is false."""
        if self.tasks is None or self._checked:
            return
        if tokenizer is None:
            raise InputError(
                "`tasks` must have a data module with a `tokenizer`, got none: give it one, or leave out `tasks`."
            )
        self.tasks.check(tokenizer, load=load)
        self._checked = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Creates the folder, after a cut at the start of fit, which is made in `setup` and may refuse the run."""
        # with the adapter attached, what setup could only expect is certain, and the training has not begun yet
        model = find_callback(trainer, DynamicPruningCallback).find_model(pl_module)
        self.format.check(Outline.of(model))
        self._stored = stored_dtype(model)  # the run may replace the folder that the model came from
        if distributed.is_rank_zero():
            self.open()

    def open(self) -> None:
        """Creates the folder and writes the run's configuration into it."""
        self.folder.claim()
        if self.config is not None:
            write_text(self.folder.path / "config.yaml", self.config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts timing the training."""
        self._started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops timing the training."""
        self.seconds, self._started = self._elapsed(), 0.0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the trained model, then exports and reports it; only the first process writes."""
        results = self.measure_model(trainer, pl_module)
        if results is not None:
            with distributed.single_process():
                self.write(trainer, pl_module, *results)

    def measure_model(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[ExportPlan, Report, Validation | None] | None:
        """Returns the plan of the export, the report and the validation data; None in all processes but the first."""
        pruning = find_callback(trainer, DynamicPruningCallback)
        model = pruning.find_model(pl_module)
        if not is_sharded(model):
            model = model.to(trainer.strategy.root_device)
        name = last_name(pruning.fit_plan.recipe, trained=self.seconds > 0)
        validation = validation_data(trainer)
        measured = None if validation is None else measure(model, *validation, label=f"Perplexity, {name}")
        whole = gathered(model)  # a collective of all processes, so before any of them returns
        if whole is None or not distributed.is_rank_zero():
            return None
        check_trained(whole, None if measured is None else measured.perplexity)
        plan = self.plan(whole)
        return plan, self._report(pruning, plan, name, measured), validation

    def plan(self, model: PreTrainedModel) -> ExportPlan:
        """Returns the plan of the export of ``model``.

        Raises:
            InputError: if the format or the data type cannot hold it, before anything is written.
        """
        self.format.check(Outline.of(model))
        return ExportPlan.of(model, export_dtype(model, self.dtype, self._stored or stored_dtype(model)))

    def stored_bytes(self, model: PreTrainedModel) -> StoredBytes:
        """Returns the bytes that the weights of ``model`` would take in the exported folder, which a target counts."""
        return self.format.stored_bytes(model, export_dtype(model, self.dtype, stored_dtype(model)))

    def _report(
        self, pruning: DynamicPruningCallback, plan: ExportPlan, name: str, measured: Measurement | None
    ) -> Report:
        """Returns the report of the trained model; ``name`` is the key of its perplexity."""
        report = summary(
            plan,
            pruning.fit_plan.recipe,
            pruning.run.done,
            pruning.run.baseline,
            pruning.run.plan.cuts[len(pruning.run.done) :],
            trained=self.seconds > 0,
            format=self.format,
        )
        # the time of cuts after step 0 is part of the training's, and is reported as their own
        cutting = sum(sum(cut.seconds.values()) for cut in pruning.run.done if cut.step > 0)
        if self.seconds:  # export of a model without a checkpoint trains nothing
            report = replace(report, seconds={**report.seconds, "train": self.seconds - cutting})
        return report if measured is None else report.with_perplexity(name, measured)

    def write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        plan: ExportPlan,
        report: Report,
        validation: Validation | None,
    ) -> None:
        """Writes and verifies the export, runs the tasks, logs and prints the report, and uploads the folder."""
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        name = plan.model.name_or_path or type(plan.model).__name__  # the first is empty for a model made in code
        base = base_name(getattr(pl_module, "pretrained", name))
        written, report = write_results(
            self.folder,
            plan,
            report,
            format=self.format,
            base=base,
            tokenizer=tokenizer,
            validation=validation,
            device=plan.model.device if shards_weights(trainer) else trainer.strategy.root_device,
        )
        self.folder.finish()
        report, failure = self._run_tasks(plan, report, base, tokenizer)
        picture = self.folder.path / "blocks.png"
        log_results(trainer.loggers, report, picture if picture in written else None, trainer.global_step)
        print_tables([table(report)], written + self.written_config)
        if self.push_to_hub is not None:
            log(f"Sent to {push(self.folder.path / 'model', self.push_to_hub)}")
        if failure is not None:
            raise failure

    @property
    def written_config(self) -> list[Path]:
        """Path of the config.yaml of the run, in a list; empty for a run that was not made at the command line."""
        return [] if self.config is None else [self.folder.path / "config.yaml"]

    def _run_tasks(
        self, plan: ExportPlan, report: Report, base: str, tokenizer: Tokenizer | None
    ) -> tuple[Report, InputError | None]:
        """Runs the tasks of lm-eval on the exported model; returns the report with their results.

        An error is returned, not raised, so that the rest of the report is logged and printed first.
        """
        if self.tasks is None:
            return report, None
        assert tokenizer is not None
        try:
            results = self.tasks.run(self._written(plan), tokenizer)
        except Exception as error:  # of the harness, the task, its data
            return report, self._failure(self.tasks, error, plan.outline)
        report = replace(report, tasks=results)
        write_tasks(self.folder, plan, report, format=self.format, base=base, tokenizer=tokenizer)
        return report, None

    def _written(self, plan: ExportPlan) -> PreTrainedModel:
        """Returns the model of the folder: the one in memory unless its weights were rounded, which are reopened."""
        if not plan.rounded:
            return plan.reference
        return self.format.open(
            self.folder.path / "model",
            plan.model.device,
            dtype=plan.compute_dtype,
            trust_remote_code=plan.outline.custom_code,
        )

    def _failure(self, tasks: Tasks, error: Exception, outline: Outline) -> InputError:
        """Returns the error with the command that runs the tasks again."""
        reason, folder = (str(error).strip() or type(error).__name__).splitlines()[0], self.folder.path / "model"
        trust = " --model.trust_remote_code true" if outline.custom_code else ""
        command = f"lit-prune evaluate --model.pretrained {folder}{trust} --tasks {','.join(tasks.names)}"
        failure = InputError(
            f"`tasks` could not be run: {reason}. The model is in {folder}: try again with `{command}`."
        )
        failure.__cause__ = error
        return failure

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Creates the folder for a verb that does not train; restores the folder that it replaced if the verb fails."""
        try:
            self.open()
            yield
        except BaseException:
            self._give_up()
            raise

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the folder if it has nothing to continue from; restores the replaced one, or prints where that is."""
        if self._give_up() and trainer.logger is self._csv:
            trainer.logger = None  # Lightning finalizes it next, which would write into the removed folder

    def _give_up(self) -> bool:
        removed = self.folder.give_up()
        if self.folder.replaced is not None:
            Console(stderr=True).print(f"The earlier run is in {self.folder.replaced}", highlight=False)
        return removed

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds of training so far, which a resumed run adds to its own."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the seconds of training before the resume."""
        self.seconds = state_dict["seconds"]

    def _elapsed(self) -> float:
        """Returns the seconds of training so far, those before a resume included."""
        return self.seconds + (time.perf_counter() - self._started if self._started else 0.0)


def find_callback(trainer: Trainer, kind: type[AnyCallback]) -> AnyCallback:
    """Returns the first callback of the Trainer that is an instance of ``kind``.

    Raises:
        InputError: if there is none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, kind):
            return callback
    raise InputError(f"`trainer.callbacks` must have a {kind.__name__} beside the ResultsCallback, got none: add one.")


def print_tables(tables: Sequence[Table], written: Sequence[Path]) -> None:
    """Prints tables and the paths of the written files."""
    console = Console()
    for grid in tables:
        console.print(grid)
    for path in written:
        console.print(str(path), highlight=False, soft_wrap=True)


def base_name(pretrained: str) -> str:
    """Returns the base model's name for the card: its id, or a folder's last two parts, as most are called model."""
    path = Path(pretrained)
    return "/".join(path.absolute().parts[-2:]) if path.exists() else pretrained
