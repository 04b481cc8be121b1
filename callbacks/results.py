"""ResultsCallback: the folder that comes out of a fit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lit_prune.callbacks.dynamic_pruning import DynamicPruningCallback
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune import distributed
from lit_prune.distributed import shards_weights
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import Measurement, measure
from lit_prune.evaluation.tasks import Tasks
from lit_prune.export.formats import ExportFormat, HuggingFace
from lit_prune.export.hub import check_repository, push
from lit_prune.export.plan import ExportPlan, Outline
from lit_prune.export.run_folder import RunFolder
from lit_prune.export.verify import check_trained
from lit_prune.files import write_text
from lit_prune.fit.batches import validation_data
from lit_prune.fit.fsdp import gathered, is_sharded
from lit_prune.progress import log
from lit_prune.report.loggers import log_results
from lit_prune.report.report import Report
from lit_prune.report.summary import summary
from lit_prune.report.table import table
from lit_prune.report.write import Validation, write_results, write_tasks

AnyCallback = TypeVar("AnyCallback", bound=Callback)


class ResultsCallback(Callback):
    """Writes the Hugging Face folder, report.json and the picture at the end of fit, and prints the table.

    It reads the LLM and the records of the DynamicPruningCallback beside it. It comes first in the list of callbacks,
    so that a folder that may not be replaced is refused before the cut.

    Args:
        output: Folder to write to; made after the cut, so that a run that is refused leaves nothing.
        overwrite: Replace the folder where it exists; it is kept aside until this run is through.
        config: Text of the run's configuration, written as config.yaml.
        csv_log: Log metrics to `logs/` in the folder where the Trainer has no logger. (A logger given to the Trainer
            writes before anything is checked.)
        push_to_hub: Repository on the Hugging Face hub that the model folder is sent to once it is written.
        format: How the model folder is written; null is HuggingFace.
        tasks: Tasks of lm-eval that are run at the end, for report.json and the model card. They need the tokenizer of
            the data module.

    Raises:
        InputError: if the folder exists and may not be replaced, or cannot be written; if the repository cannot be.
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
    ) -> None:
        if push_to_hub is not None:
            check_repository(push_to_hub)
        self.folder = RunFolder(output, overwrite=overwrite)
        self.config, self.csv_log, self.push_to_hub = config, csv_log, push_to_hub
        self.tasks, self._checked = tasks, False
        self.format = HuggingFace() if format is None else format
        self.seconds = 0.0
        self._begin = 0.0
        self._csv: CSVLogger | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the folder can be made, before anything is done."""
        if stage == "fit":
            find_callback(trainer, DynamicPruningCallback)
            self.folder.resume = self.folder.holds(trainer.ckpt_path)
            if distributed.is_rank_zero():
                self.folder.check()
                self.check_tasks(getattr(trainer.datamodule, "tokenizer", None))  # type: ignore[attr-defined]

    def check_tasks(self, tokenizer: Tokenizer | None, *, load: bool = True) -> None:
        """Checks once that the tasks can be run; reads their data too, unless ``load`` is false."""
        if self.tasks is None or self._checked:
            return
        if tokenizer is None:
            raise InputError("`tasks` needs a data module with a `tokenizer`, there is none.")
        self.tasks.check(tokenizer, load=load)
        self._checked = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the folder: a cut at the start of fit, which may refuse the run, is done in `setup`."""
        # a cut before the first step is made by now, and its adapter attached: hours before the export asks again
        self.format.check(Outline.of(find_callback(trainer, DynamicPruningCallback).find_model(pl_module)))
        if distributed.is_rank_zero():
            self.open()
        if self.csv_log and trainer.logger is None:
            trainer.logger = self._csv = CSVLogger(self.folder.path, name="logs")

    def open(self) -> None:
        """Makes the folder, and writes the run's configuration into it."""
        self.folder.claim()
        if self.config is not None:
            write_text(self.folder.path / "config.yaml", self.config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the training."""
        self._begin = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock of the training."""
        self.seconds, self._begin = self._elapsed(), 0.0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the trained model, exports it and reports; of several processes the first one writes."""
        results = self.measure_model(trainer, pl_module)
        if results is not None:
            with distributed.single_process():
                self.write(trainer, pl_module, *results)

    def measure_model(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[ExportPlan, Report, Validation | None] | None:
        """Returns plan and report of the export, and the validation data; in the first process, None in the others."""
        pruning = find_callback(trainer, DynamicPruningCallback)
        model = pruning.find_model(pl_module)
        if not is_sharded(model):
            model = model.to(trainer.strategy.root_device)
        name = "after" if pruning.fit_plan.recipe is None else "recovered"
        validation = validation_data(trainer)
        measured = None if validation is None else measure(model, *validation, label=f"Perplexity, {name}")
        whole = gathered(model)
        if whole is None or not distributed.is_rank_zero():
            return None
        check_trained(whole, None if measured is None else measured.perplexity)
        plan = self.plan(whole)
        return plan, self._report(pruning, plan, name, measured), validation

    def plan(self, model: PreTrainedModel) -> ExportPlan:
        """Returns the plan of the export of ``model``.

        Raises:
            InputError: if the format cannot hold it; nothing has been merged or written then.
        """
        self.format.check(Outline.of(model))
        return ExportPlan.of(model)

    def _report(
        self, pruning: DynamicPruningCallback, plan: ExportPlan, name: str, measured: Measurement | None
    ) -> Report:
        """The report of the trained model, with its perplexity by ``name``."""
        report = summary(
            plan,
            pruning.fit_plan.recipe,
            pruning.run.done,
            pruning.run.baseline,
            pruning.fit_plan.cuts[len(pruning.run.done) :],
            format=self.format,
        )
        # cuts after the start are within the clock of the training, and have seconds of their own
        cutting = sum(sum(cut.seconds.values()) for cut in pruning.run.done if cut.step > 0)
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
        """Writes and verifies the export, writes and prints the report, and sends the folder to the hub where asked."""
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        base = base_name(getattr(pl_module, "pretrained", type(plan.model).__name__))
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
        report, failure = self._run_tasks(plan.reference, report, base, tokenizer)
        picture = self.folder.path / "blocks.png"
        log_results(trainer.loggers, report, picture if picture in written else None, trainer.global_step)
        config = [] if self.config is None else [self.folder.path / "config.yaml"]
        print_tables([table(report)], written + config)
        if self.push_to_hub is not None:
            log(f"Sent to {push(self.folder.path / 'model', self.push_to_hub)}")
        if failure is not None:
            raise failure

    def _run_tasks(
        self, model: PreTrainedModel, report: Report, base: str, tokenizer: Tokenizer | None
    ) -> tuple[Report, InputError | None]:
        """Runs the tasks of lm-eval on ``model``, once its folder is written; returns the report with their results.

        A failure is returned, not raised, so that the rest of the report is logged and printed before it.
        """
        if self.tasks is None:
            return report, None
        assert tokenizer is not None
        try:
            results = self.tasks.run(model, tokenizer)
        except Exception as error:  # of the harness, the task, its data
            return report, self._failure(self.tasks, error)
        report = replace(report, tasks=results)
        write_tasks(self.folder, report, base=base, tokenizer=tokenizer)
        return report, None

    def _failure(self, tasks: Tasks, error: Exception) -> InputError:
        """The error that says how to run the tasks again."""
        first, folder = (str(error).strip() or type(error).__name__).splitlines()[0], self.folder.path / "model"
        again = f"lit-prune evaluate --model.pretrained {folder} --tasks {','.join(tasks.names)}"
        failure = InputError(f"`tasks` could not be run: {first}. The model is in {folder}: try again with `{again}`.")
        failure.__cause__ = error
        return failure

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the folder for a verb that does not train; after a failure, puts back a folder that it replaced."""
        try:
            self.open()
            yield
        except BaseException:
            self._give_up()
            raise

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes a folder with nothing to go on from; puts back one that it replaced, or says where that is."""
        if self._give_up() and trainer.logger is self._csv:
            trainer.logger = None  # which Lightning finalizes next, and which would write into the removed folder

    def _give_up(self) -> bool:
        removed = self.folder.give_up()
        if self.folder.replaced is not None:
            Console(stderr=True).print(f"The earlier run is kept in {self.folder.replaced}", highlight=False)
        return removed

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds of training so far."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the seconds of training of the run that is resumed."""
        self.seconds = state_dict["seconds"]

    def _elapsed(self) -> float:
        """The seconds of training, those before a resume and those of the clock that may be running."""
        return self.seconds + (time.perf_counter() - self._begin if self._begin else 0.0)


def find_callback(trainer: Trainer, kind: type[AnyCallback]) -> AnyCallback:
    """Returns the Trainer's callback of a kind.

    Raises:
        InputError: if there is none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, kind):
            return callback
    raise InputError(f"`trainer.callbacks` must hold a {kind.__name__} beside the ResultsCallback, got none.")


def print_tables(tables: Sequence[Table], written: Sequence[Path]) -> None:
    """Prints tables, and the paths of what was written."""
    console = Console()
    for grid in tables:
        console.print(grid)
    for path in written:
        console.print(str(path), highlight=False, soft_wrap=True)


def base_name(pretrained: str) -> str:
    """Returns what a card calls the base model: its id, or the last two names of a folder, since most end in model."""
    path = Path(pretrained)
    return "/".join(path.absolute().parts[-2:]) if path.exists() else pretrained
