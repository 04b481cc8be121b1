"""The `lit-prune` command: fit, validate and test as in any LightningCLI; prune, score, export, evaluate of our own."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, NoReturn

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns on import that it has no CPU kernels

import datasets  # noqa: E402
import transformers  # noqa: E402
from jsonargparse import Namespace  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch import LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import TQDMProgressBar  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.utilities import rank_zero_only  # noqa: E402

import lit_prune.cli.plugins  # noqa: E402, F401 (short names)
from lit_prune.callbacks.dynamic_pruning import DynamicPruningCallback  # noqa: E402
from lit_prune.callbacks.results import ResultsCallback, find_callback  # noqa: E402
from lit_prune.callbacks.run_checkpoint import RunCheckpoint  # noqa: E402
from lit_prune.checkpointing.resume import stored_run  # noqa: E402
from lit_prune.cli.errors import explain  # noqa: E402
from lit_prune.cli.preflight import WRITES, check_verb, fill_lengths, found_checkpoint, of_export  # noqa: E402
from lit_prune.cli.trainer import PruneTrainer  # noqa: E402
from lit_prune.data.datamodule import TextDataModule  # noqa: E402
from lit_prune.distributed import shards  # noqa: E402
from lit_prune.errors import InputError  # noqa: E402
from lit_prune.evaluation.tasks import HarnessSettings, Tasks, names_of  # noqa: E402
from lit_prune.export.formats import ExportFormat  # noqa: E402
from lit_prune.files import refused  # noqa: E402
from lit_prune.fit.batches import check_one_process, check_processes  # noqa: E402
from lit_prune.fit.module import PrunableLM  # noqa: E402
from lit_prune.models.families import blocks_path, packs  # noqa: E402
from lit_prune.models.load import skeleton  # noqa: E402
from lit_prune.progress import log  # noqa: E402
from lit_prune.recover import LoRA, MaskedLoRA, QLoRA  # noqa: E402

ADVICE = ("Tip:", "Seed set to", "GPU available", "TPU available")  # of Lightning
ADAPTERS = (LoRA, MaskedLoRA, QLoRA)
ONCE = ("ckpt_path", "weights_only", "verbose", "merge", "push_to_hub")  # what no configuration keeps
DESCRIPTION = "Prune a large language model while it is being fine-tuned, and heal it in the same run."


class Parser(LightningArgumentParser):
    """Answers a mistake in a few lines: what is wrong, near misses, what there is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the explanation and exits with code 2."""
        if not self.exit_on_error:  # the parser of one class, whose error is part of a larger one
            super().error(message, ex)
        _fail(explain(message, getattr(ex, "subcommand_parser", None) or self))


class LitPruneCLI(LightningCLI):
    """LightningCLI with the groups `model`, `data`, `pruning` and `trainer`, and where results go."""

    trainer: PruneTrainer
    model: PrunableLM
    datamodule: TextDataModule

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            PrunableLM,
            TextDataModule,
            save_config_callback=None,
            trainer_class=PruneTrainer,
            trainer_defaults={"devices": 1, "num_sanity_val_steps": 0, "enable_model_summary": False},
            seed_everything_default=0,
            parser_kwargs={"description": DESCRIPTION},
            parser_class=Parser,
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns the verbs, each with the arguments that do not come from the command line."""
        verbs = LightningCLI.subcommands()
        own = {"model", "datamodule"}
        ours = dict.fromkeys(("prune", "score", "export", "evaluate"), own)
        return {name: verbs[name] for name in ("fit", "validate", "test")} | ours

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:  # type: ignore[override]
        """Parses the command line; what is exported has the settings of its run."""
        given = sys.argv[1:] if args is None else args
        check_verb(given, self.subcommands())
        self.config = parser.parse_args(of_export(given, self._parser("export").get_default("output")))

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration as the user gave it: our checkpoints hold no hyper-parameters to put over it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the group `pruning`, with its defaults, and `output`."""
        parser.add_argument("--output", default="runs/lit_prune", help="Folder to write the results to.")
        parser.add_argument("--overwrite", action="store_true", help="Replace the output folder where it exists.")
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=50,
            help="Optimizer steps between checkpoints; a run that is killed goes on from the last one.",
        )
        parser.add_argument(
            "--push_to_hub",
            type=str | None,
            default=None,
            help="Repository on the Hugging Face hub that the model folder is sent to once it is written.",
        )
        parser.add_argument(
            "--tasks",
            type=str | list[str] | None,
            default=None,
            help="Tasks of lm-eval to ask the model (fit, prune, export, evaluate): arc_easy,piqa, or YAML files.",
        )
        parser.add_argument(
            "--format",
            type=ExportFormat,
            default={"class_path": "lit_prune.export.formats.HuggingFace"},
            help="How the model folder is written (fit, prune, export).",
        )
        parser.add_class_arguments(HarnessSettings, "lm_eval")
        parser.add_lightning_class_args(DynamicPruningCallback, "pruning")
        parser.set_defaults(
            {
                "pruning.method": {"class_path": "lit_prune.prune.Wanda"},
                "pruning.allocation": {"class_path": "lit_prune.allocate.DLP"},
                "pruning.recovery": {"class_path": "lit_prune.recover.LoRA"},
            }
        )
        parser.link_arguments("model.pretrained", "data.tokenizer")

    def before_instantiate_classes(self) -> None:
        """Adds the callbacks that write; checks the output folder and the checkpoint before anything is made."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        if DynamicPruningCallback.__name__ in str(config.trainer.callbacks):
            raise InputError("`trainer.callbacks` must not hold a DynamicPruningCallback: `pruning` is one already.")
        output = Path(config.output)
        if config.get("ckpt_path"):
            config.ckpt_path = found_checkpoint(config.ckpt_path, output)
            if self.subcommand in ("fit", "export"):
                stored_run(config.ckpt_path)
        fill_lengths(config)
        if config.push_to_hub is not None and self.subcommand not in WRITES:
            raise InputError(f"`push_to_hub` must be left out for {self.subcommand}, which writes no model.")
        saved = self._saved(config)
        results = ResultsCallback(
            str(output),
            config.overwrite,
            saved,
            csv_log=True,
            push_to_hub=config.push_to_hub,
            tasks=self._tasks(config),
        )
        self.trainer_defaults["callbacks"] = [results]
        if (
            self.subcommand in (*WRITES, "score", "evaluate") and _rank() == 0
        ):  # the others start when the first is there
            results.folder.resume = results.folder.holds(config.get("ckpt_path"))
            results.folder.check()
            if self.subcommand == "export" and (output / "model").exists() and not config.overwrite:
                raise InputError(
                    f"`output` has a model already, {output / 'model'}: choose another with `--output DIR`, or replace "
                    "it with `--overwrite`."
                )
        if config.trainer.max_steps < -1 or (config.trainer.max_steps == 0 and self.subcommand == "fit"):
            raise InputError(
                f"`trainer.max_steps` must be at least 1, or -1 for as many as `trainer.max_epochs` take, got "
                f"{config.trainer.max_steps}; `lit-prune prune` prunes without training."
            )
        ends = {None: config.trainer.max_time is not None, -1: False}  # null without either is Lightning's 1000 epochs
        endless = config.trainer.max_steps == -1 and not ends.get(config.trainer.max_epochs, True)
        if endless and self.subcommand == "fit":
            raise InputError(
                "`trainer.max_steps` or `trainer.max_epochs` must be given: the cosine needs an end. `lit-prune prune` "
                "prunes without training."
            )
        if config.trainer.logger is None:
            config.trainer.logger = False  # results.csv_log stands in for it
        if self.subcommand != "fit":
            return
        if config.trainer.enable_progress_bar is not False and "ProgressBar" not in str(config.trainer.callbacks):
            self.trainer_defaults["callbacks"].append(TQDMProgressBar())  # the rich one counts epochs to -2
        if config.trainer.enable_checkpointing is not False:
            keeps = RunCheckpoint(str(output / "checkpoints"), config.checkpoint_every)
            self.trainer_defaults["callbacks"].append(keeps)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the Trainer; what it refuses is told in a line."""
        try:
            return super().instantiate_trainer(**kwargs)
        except InputError:
            raise
        except ValueError as error:
            hint = " One that is a class has settings, see docs/devices.md." if "strategy name" in str(error) else ""
            raise InputError(f"`trainer` cannot be made: {str(error).partition('. ')[0]}.{hint}") from error

    def _tasks(self, config: Namespace) -> Tasks | None:
        """The tasks that are to be asked; verbs that have no model to ask at their end leave them alone."""
        names = names_of(config.tasks)
        if not names or self.subcommand not in (*WRITES, "evaluate"):
            return None
        if config.model.on_disk:
            raise InputError("`tasks` must be left out with `model.on_disk`, they need the whole model in memory.")
        return Tasks(names, HarnessSettings(**vars(config.lm_eval)))

    def _saved(self, config: Namespace) -> str:
        """Returns the configuration as YAML, for any verb to take: without what was meant for this one run."""
        kept = config.clone()
        kept.overwrite = False
        text = self._parser(self.subcommand).dump(kept, skip_unset=False)
        return "".join(line for line in text.splitlines(keepends=True) if line.split(":")[0] not in ONCE)

    def after_validate(self) -> None:
        """Says what the perplexity was measured on."""
        self._say_protocol("val")

    def after_test(self) -> None:
        """Says what the perplexity was measured on."""
        self._say_protocol("test")

    def _say_protocol(self, part: Literal["val", "test"]) -> None:
        log(f"{self.datamodule.describe(part)}; {self.datamodule.windows(part).description}")

    def fit(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Runs fit; the callbacks are told of the checkpoint in time, which `Trainer.fit(ckpt_path=...)` does not."""
        if ckpt_path is not None:
            self.trainer.ckpt_path = ckpt_path
        self.trainer.fit(model, datamodule=datamodule, weights_only=weights_only)

    def after_instantiate_classes(self) -> None:
        """Checks what hangs on the LLM's config and on the data together, before weights and text are read."""
        pruning, results = (
            find_callback(self.trainer, DynamicPruningCallback),
            find_callback(self.trainer, ResultsCallback),
        )
        results.format = self.config_init[self.subcommand].format  # made with the other classes, after the callback
        fits = self.subcommand == "fit"
        if fits:
            pruning.check_trainer(self.trainer)
            if path := self.config[self.subcommand].get("ckpt_path"):
                pruning.check_resumed(self.trainer, self.model, self.datamodule, path)
        elif shards(self.trainer) and self.subcommand in ("validate", "test"):
            raise InputError(f"`trainer.strategy` must not be ModelParallelStrategy for {self.subcommand}: use ddp.")
        if self.subcommand == "evaluate" and results.tasks is None:
            raise InputError("`tasks` must be given, such as `--tasks arc_easy,piqa`, got none.")
        if results.tasks is not None and _rank() == 0:  # no other process is there yet
            results.check_tasks(self.datamodule.tokenizer, load=self.subcommand != "evaluate")
        if self.subcommand == "evaluate":  # which reads no data of ours
            return
        self.datamodule.check_vocabulary(self.model.config)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        lengths = {f"data.{field}": getattr(self.datamodule, field) for field in ("seq_length", "val_seq_length")}
        if pruning.fit_plan.recipe is not None and self.subcommand in ("fit", "prune", "score"):
            lengths["pruning.calibration.seq_length"] = pruning.fit_plan.calibration.seq_length
            blocks_path(self.model.config, pruning.fit_plan.recipe.blocks)
            check_processes(self.trainer)
            if self.subcommand != "fit":
                check_one_process(self.trainer, self.subcommand)
        elif fits and isinstance(pruning.fit_plan.recovery, ADAPTERS) and self.model.architecture is not None:
            raise InputError(
                "`pruning.recovery` must be null where `model.architecture` begins from random weights and nothing is "
                f"cut, they would be frozen; got {pruning.fit_plan.recovery}."
            )
        instructions = self.datamodule.instructions
        if instructions is not None and instructions.packed and not packs(self.model.config):
            raise InputError(
                "`data.instructions.packed` must be false for the family "
                f"{self.model.config.model_type!r}, whose attention would not keep the conversations of a window apart."
            )
        if self.subcommand in ("fit", "prune", "score"):
            pruning.check_unloaded(skeleton(self.model.config), self.datamodule, trains=fits)
        for field, length in lengths.items():
            if limit is not None and length > limit:
                raise InputError(f"`{field}` must be at most {limit}, the model's limit, got {length}.")


def _rank() -> int:
    """Which of several processes this is, by the environment: they do not know each other yet."""
    return getattr(rank_zero_only, "rank", 0)


def _fail(message: str) -> NoReturn:
    where = f" (process {_rank()})" if _rank() else ""
    print(f"lit-prune: error{where}: {message}", file=sys.stderr)
    sys.exit(2)


def _quiet() -> None:
    """Silences what the libraries say of themselves: our own bars and lines tell what goes on."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not any(text in record.getMessage() for text in ADVICE))
    for message in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*", ".*Checkpoint directory.*"):
        warnings.filterwarnings("ignore", message)


def main(args: list[str] | None = None) -> None:
    """Runs the command; a user's mistake ends in one line and exit code 2."""
    _quiet()
    try:
        LitPruneCLI(args)
    except InputError as error:
        _fail(str(error))
    except MisconfigurationException as error:
        _fail(str(error).splitlines()[0])
    except ValueError as error:  # jsonargparse wraps what a class raises where a field may be of several types
        wrapped = re.search(r"^\s*- (`.+)$", str(error), re.MULTILINE)
        if wrapped is None or "Union subtypes" not in str(error):
            raise
        _fail(wrapped.group(1))
    except Exception as error:
        if (told := refused(error)) is None:
            raise
        _fail(f"`output` must be where there is room: {told}. Free some space, or choose another `--output DIR`.")


if __name__ == "__main__":
    main()
