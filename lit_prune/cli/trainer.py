"""PruneTrainer, a Lightning Trainer with the verbs of the command as methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from transformers import PreTrainedModel

from lit_prune.callbacks.dynamic_pruning import DynamicPruningCallback
from lit_prune.callbacks.results import ResultsCallback, find_callback, print_tables
from lit_prune.data.batches import calibration_batches, statistics_key, validation_data
from lit_prune.errors import InputError
from lit_prune.export.plan import Outline, check_merge
from lit_prune.files import write_text
from lit_prune.fit.baseline import measure_baseline
from lit_prune.fit.cut import CutInputs, measured_cut
from lit_prune.fit.preflight import check_caches
from lit_prune.models.on_disk import offload_folder, on_disk, placed
from lit_prune.pipeline import prune, score_with_statistics
from lit_prune.recipe import recipe_record
from lit_prune.recover import Snapshot
from lit_prune.report.records import SearchRecord
from lit_prune.report.report import ScoreReport, TaskReport, to_json, versions
from lit_prune.report.sections import Sparsity
from lit_prune.report.summary import summary
from lit_prune.report.table import block_table, metrics_table, task_table
from lit_prune.report.write import write_scores


class PruneTrainer(Trainer):
    """A Lightning Trainer that also prunes, scores, exports and evaluates models without training them."""

    def fit(  # type: ignore[override]
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Prune a model and train it to recover, in one run; writes a Hugging Face folder, a report and a picture.

        Args:
            ckpt_path: Checkpoint to resume from; `last` is the last one in the output folder.
            weights_only: Refuse a checkpoint that holds anything but weights and plain values.
        """
        with _interruptible():
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def validate(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Measure the perplexity of a model or a checkpoint on the validation text; writes nothing.

        Args:
            ckpt_path: Checkpoint of a fit to measure; null measures the model itself.
            verbose: Print the perplexity.
            weights_only: Refuse a checkpoint that holds anything but weights and plain values.
        """
        with _interruptible():
            metrics = super().validate(model, dataloaders, ckpt_path, False, datamodule, weights_only)
        if verbose:
            self._print_metrics(metrics, ckpt_path)
        return metrics

    def test(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Measure the perplexity of a model or a checkpoint on the test text; writes nothing.

        Args:
            ckpt_path: Checkpoint of a fit to measure; null measures the model itself.
            verbose: Print the perplexity.
            weights_only: Refuse a checkpoint that holds anything but weights and plain values.
        """
        with _interruptible():
            metrics = super().test(model, dataloaders, ckpt_path, False, datamodule, weights_only)
        if verbose:
            self._print_metrics(metrics, ckpt_path)
        return metrics

    def prune(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Prune a model in one shot, without training; writes the same folder as fit."""
        pruning, results = self._prepared(model, datamodule)
        llm, device = pruning.find_model(model), self.strategy.root_device
        fit_plan = pruning.run.plan
        validation = validation_data(self) if fit_plan.measure else None
        assert fit_plan.recipe is not None
        calibration = calibration_batches(self, fit_plan.calibration)
        check_caches(fit_plan, llm, *calibration)
        measured, statistics = fit_plan.measure, fit_plan.statistics
        inputs = CutInputs(fit_plan.recipe, *calibration, validation, device, measured=measured, statistics=statistics)
        inputs = inputs.with_sparsity(llm, fit_plan.target_perplexity)
        with offload_folder(llm, results.folder.path), self._logging():
            with measured_cut(llm, inputs) as cut:
                cut.pruned = prune(llm, inputs.batches, inputs.recipe, device=device, statistics=statistics)
            plan = results.plan(llm)
            report = summary(plan, pruning.fit_plan.recipe, [cut.record], format=results.format)
            with results.opened():
                results.write(self, model, plan, report, validation)

    def score(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Score the blocks without pruning; writes scores, rates, a picture, a plan to edit and statistics to reuse."""
        pruning, results = self._prepared(model, datamodule)
        recipe = pruning.run.plan.recipe
        assert recipe is not None
        if pruning.fit_plan.target_perplexity is not None:
            raise InputError(
                "`pruning.target_perplexity` must be left out for score, which cuts nothing: use `lit-prune prune`."
            )
        llm, (batches, settings) = pruning.find_model(model), calibration_batches(self, pruning.fit_plan.calibration)
        check_caches(pruning.run.plan, llm, batches, settings)
        device, names = self.strategy.root_device, statistics_key(settings, llm)
        scored, cached = score_with_statistics(
            llm, batches, recipe, device=device, settings=names, statistics=pruning.fit_plan.statistics
        )
        report = ScoreReport(
            sparsity=Sparsity(
                requested=recipe.sparsity, budget=recipe.budget, target=scored.target, planned=scored.planned
            ),
            recipe=recipe_record(recipe),
            calibration=settings,
            scores=scored.scores,
            rates=scored.rates,
            linears=scored.linears,
            parts=scored.parts,
            search=SearchRecord.from_dict(scored.search),
            seconds={"score": scored.seconds},
            versions=versions(),
        )
        with results.opened(), self._logging():
            written = write_scores(results.folder.path, report, cached)
        results.folder.finish()
        print_tables([block_table(report)], written + results.written_config)

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        merge: bool = False,
    ) -> None:
        """Export a model, or a checkpoint of a fit, to a Hugging Face folder or a .gguf file, with a report.

        Args:
            ckpt_path: Checkpoint to export; `last` is the last one in the output folder. Settings are read from the
                config.yaml of its run, unless `--config` is given. null exports `model.pretrained`.
            merge: Fail if the adapter cannot be merged into the weights. MaskedLoRA is always merged, LoRA if no
                weights are masked.
        """
        pruning, results = find_callback(self, DynamicPruningCallback), find_callback(self, ResultsCallback)
        resume = pruning.resume
        if resume is not None:
            resume.check_settings(pruning.fit_plan.settings())
        self._data_connector.attach_data(model, datamodule=datamodule)
        llm = self._loaded(model, pruning)
        if resume is not None:
            pruning.run.resolve(self, llm)
            resume.load(model, [pruning, results])
        else:
            pruning.run.baseline = measure_baseline(llm, None, self.strategy.root_device)
        if merge:
            check_merge(Snapshot.of(llm))
        results.format.check(Outline.of(llm))
        written = results.measure_model(self, model)
        assert written is not None  # export runs in one process, which is the first
        with results.opened(), self._logging():
            results.write(self, model, *written)

    def evaluate(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Evaluate a model on tasks of lm-eval, such as `--tasks arc_easy,piqa`; writes report.json, but no model."""
        pruning, results = find_callback(self, DynamicPruningCallback), find_callback(self, ResultsCallback)
        assert results.tasks is not None
        llm = placed(self._loaded(model, pruning), self.strategy.root_device)
        report = TaskReport(
            model=getattr(model, "pretrained", None),
            dtype=str(llm.dtype).removeprefix("torch."),
            tasks=results.tasks.run(llm, datamodule.tokenizer),  # type: ignore[attr-defined]
            versions=versions(),
        )
        with results.opened():
            write_text(results.folder.path / "report.json", to_json(report))
        results.folder.finish()
        print_tables([task_table(report)], [results.folder.path / "report.json"])

    def _print_metrics(self, metrics: Sequence[Mapping[str, float]], ckpt_path: str | None) -> None:
        """Prints the metrics of the model or the checkpoint that was measured, in one process."""
        if self.is_global_zero:
            model = getattr(self.lightning_module, "pretrained", type(self.lightning_module).__name__)
            print_tables([metrics_table(ckpt_path or model, metrics)], [])

    def _prepared(
        self, model: LightningModule, datamodule: LightningDataModule
    ) -> tuple[DynamicPruningCallback, ResultsCallback]:
        """Loads the LLM, attaches the data and checks that the recipe fits the LLM; returns our two callbacks."""
        pruning, results = find_callback(self, DynamicPruningCallback), find_callback(self, ResultsCallback)
        if pruning.fit_plan.recipe is None:
            raise InputError("`pruning.method` must be given without training, such as Wanda, got null.")
        self._data_connector.attach_data(model, datamodule=datamodule)
        llm = self._loaded(model, pruning)
        pruning.fit_plan.take_zeros(llm, trains=False)
        pruning.run.resolve(self, llm)
        pruning.run.plan.recipe.check(llm)
        return pruning, results

    def _loaded(self, model: LightningModule, pruning: DynamicPruningCallback) -> PreTrainedModel:
        """Returns the LLM, loaded in the precision that fit would convert it to before a cut."""
        model.configure_model()
        llm = pruning.find_model(model)
        if on_disk(llm) is not None and isinstance(self.precision_plugin, (DoublePrecision, HalfPrecision)):
            raise InputError(
                f"`trainer.precision` must be 32-true with `model.on_disk`, got {self.precision}: weights on disk "
                "are used in the type that they are stored in."
            )
        self.precision_plugin.convert_module(llm)
        return llm

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Finalizes every logger when the body is done, as fit does."""
        status = "failed"
        try:
            yield
            status = "success"
        finally:
            for logger in self.loggers:
                logger.finalize(status)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turns the exit by which Lightning ends after Ctrl-C, with code 1, back into the KeyboardInterrupt."""
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise ended.__context__ from None
        raise
