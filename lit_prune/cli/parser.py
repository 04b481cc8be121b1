"""LitPruneCLI, the LightningCLI of the command: its arguments, their defaults, and the objects built from them."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

# bitsandbytes warns on import that it has no CPU kernels
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import transformers  # noqa: E402
import yaml  # noqa: E402
from jsonargparse import Namespace  # noqa: E402
from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning_utilities.core.enums import StrEnum  # noqa: E402

import lit_prune  # noqa: E402
from lit_prune.callbacks.dynamic_pruning import DynamicPruningCallback  # noqa: E402
from lit_prune.callbacks.progress_bar import FitProgressBar  # noqa: E402
from lit_prune.callbacks.results import ResultsCallback, find_callback  # noqa: E402
from lit_prune.callbacks.run_checkpoint import RunCheckpoint  # noqa: E402
from lit_prune.checkpointing.resume import Resume  # noqa: E402
from lit_prune.cli.defaults import (  # noqa: E402
    allocation_arguments,
    check_allocation_named,
    default_allocation,
    export_arguments,
    fill_lengths,
    find_checkpoint,
    settings_last,
    spell_format,
)
from lit_prune.cli.errors import explain, one_line, with_options  # noqa: E402
from lit_prune.cli.failure import fail  # noqa: E402
from lit_prune.cli.help import PlainHelp, arrange  # noqa: E402
from lit_prune.cli.preflight import check_effects, check_objects, check_output, check_settings  # noqa: E402
from lit_prune.cli.signatures import DESCRIPTION, OPTIONS, VERBS, WRITES  # noqa: E402
from lit_prune.cli.trainer import PruneTrainer  # noqa: E402
from lit_prune.data.datamodule import TextDataModule  # noqa: E402
from lit_prune.errors import InputError  # noqa: E402
from lit_prune.evaluation.tasks import HarnessSettings, Tasks, names_of  # noqa: E402
from lit_prune.export.formats import ExportFormat  # noqa: E402
from lit_prune.fit.module import PrunableLM  # noqa: E402
from lit_prune.progress import log  # noqa: E402

# Prefixes of Lightning's advice, and regular expressions of its warnings, that do not concern users of the command.
ADVICE = ("Tip:", "Seed set to", "GPU available", "TPU available", "Loading `train_dataloader` to estimate")
WARNINGS = (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*", ".*Checkpoint directory.*")
# Arguments that hold for one call of the command only, and are not saved in config.yaml.
NOT_SAVED = ("ckpt_path", "weights_only", "verbose", "merge", "push_to_hub")


# Timer's default `interval=Interval.step` is typed as str, so jsonargparse hands the enum itself to YAML, which fails.
yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, value: dumper.represent_str(value.value))


class Parser(LightningArgumentParser):
    """An argument parser whose errors are a line or two: what is wrong, close matches, and the choices."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the explanation and exits with code 2."""
        if not self.exit_on_error:  # the inner parser of one class, whose error the outer parser reports
            super().error(message, ex)
        fail(explain(message, getattr(ex, "subcommand_parser", None) or self))


class LitPruneCLI(LightningCLI):
    """A LightningCLI with the groups of ``signatures.GROUPS``, and options of the output."""

    trainer: PruneTrainer
    model: PrunableLM
    datamodule: TextDataModule
    resume: Resume | None = None  # the checkpoint that fit resumes from, or that export reads

    def __init__(self, args: Sequence[str]) -> None:
        try:
            super().__init__(
                PrunableLM,
                TextDataModule,
                save_config_callback=None,
                trainer_class=PruneTrainer,
                trainer_defaults={"devices": 1, "num_sanity_val_steps": 0, "enable_model_summary": False},
                seed_everything_default=0,
                parser_kwargs={"description": DESCRIPTION, "formatter_class": PlainHelp, "allow_abbrev": False},
                parser_class=Parser,
                args=list(args),
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except ValueError as error:
            message = str(error) if isinstance(error, InputError) else one_line(error)
            if message is None or not hasattr(self, "config"):
                raise
            raise InputError(with_options(message, self.config[self.config.subcommand])) from error

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns the verbs, each with the parameters that do not come from the command line."""
        return VERBS

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        arrange(parser, subcommand)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:  # type: ignore[override]
        """Parses the command line; export takes its settings from the run that wrote the checkpoint."""
        args = export_arguments(settings_last(spell_format(args)), self._parser("export").get_default("output"))
        given, args = args, allocation_arguments(args)
        self.config = parser.parse_args(args)
        pruning = self.config[self.config.subcommand].pruning
        check_effects(given, self.config.subcommand, pruning.method)
        check_allocation_named(given, pruning.method)
        if pruning.allocation is None and pruning.method is not None:
            self.config = parser.parse_args([*args, f"--pruning.allocation={default_allocation(pruning.method)}"])

    def _parse_ckpt_path(self) -> None:
        """Does nothing; LightningCLI would let the checkpoint's hyper-parameters override the configuration."""

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the seed."""
        text = "Seed of the random number generators of Python, NumPy and torch; true draws a seed at random."
        parser.add_argument("--seed_everything", type=bool | int, default=self.seed_everything_default, help=text)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of the output, and the groups `lm_eval` and `pruning`."""
        for option in OPTIONS:
            if option.type is bool:
                parser.add_argument(f"--{option.name}", action="store_true", help=option.help)
            else:
                parser.add_argument(f"--{option.name}", type=option.type, default=option.default, help=option.help)
        parser.add_argument(
            "--format",
            type=ExportFormat,
            default={"class_path": "lit_prune.export.formats.HuggingFace"},
            help="Format of the model folder (fit, prune, export): HuggingFace, packed, which leaves zeros out, or "
            "gguf for llama.cpp.",
        )
        parser.add_class_arguments(HarnessSettings, "lm_eval")
        parser.add_lightning_class_args(DynamicPruningCallback, "pruning")
        parser.set_defaults(
            {
                "pruning.method": {"class_path": "lit_prune.pruning.Wanda"},
                "pruning.recovery": {"class_path": "lit_prune.recover.MaskedLoRA"},
            }
        )
        parser.link_arguments("model.pretrained", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")

    def before_instantiate_classes(self) -> None:
        """Checks the settings and the output folder, then adds the callbacks that write results and checkpoints."""
        assert self.subcommand is not None
        verb, config = self.subcommand, self.config[self.subcommand]
        config.output = str(Path(config.output).expanduser())  # quoted, a shell leaves ~ to us
        check_settings(config, verb)
        if config.get("ckpt_path"):
            config.ckpt_path = find_checkpoint(config.ckpt_path, Path(config.output))
            if verb in ("fit", "export"):
                self.resume = Resume.open(config.ckpt_path)
        elif verb == "export":
            config.pruning.method = None  # the model is exported as it is
        fill_lengths(config)
        results = self._results(config)
        check_output(results, config, verb)
        if config.trainer.logger is None:
            config.trainer.logger = False  # ResultsCallback adds a CSV logger
        self.trainer_defaults["callbacks"] = [results, *(self._callbacks_of_fit(config) if verb == "fit" else [])]

    def _results(self, config: Namespace) -> ResultsCallback:
        return ResultsCallback(
            config.output,
            config.overwrite,
            self._config_yaml(config),
            csv_log=True,
            push_to_hub=config.push_to_hub,
            tasks=self._tasks(config),
            dtype=config.export.dtype,
        )

    def _callbacks_of_fit(self, config: Namespace) -> list[Any]:
        callbacks: list[Any] = []
        if config.trainer.enable_progress_bar is not False and "ProgressBar" not in str(config.trainer.callbacks):
            callbacks.append(FitProgressBar())  # the rich one, Lightning's default, counts epochs to -2
        if config.trainer.enable_checkpointing is not False:
            callbacks.append(RunCheckpoint(str(Path(config.output) / "checkpoints"), config.checkpoint_every))
        return callbacks

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Returns the Trainer.

        Raises:
            InputError: for settings that Lightning rejects, with the first sentence of its message.
        """
        try:
            return super().instantiate_trainer(**kwargs)
        except InputError:
            raise
        except (ImportError, RuntimeError, ValueError) as error:
            hint = (
                " A strategy with settings is given by class_path: see docs/devices.md."
                if "strategy name" in str(error)
                else ""
            )
            reason = str(error).partition(". ")[0].rstrip(".")
            raise InputError(f"`trainer` must have settings that Lightning accepts: {reason}.{hint}") from error

    def _tasks(self, config: Namespace) -> Tasks | None:
        """Returns the tasks of lm-eval that are run at the end; None for verbs that run none."""
        names = names_of(config.tasks)
        if not names or self.subcommand not in (*WRITES, "evaluate"):
            return None
        if config.model.on_disk:
            raise InputError("`tasks` must be left out with `model.on_disk`: lm-eval needs the whole model in memory.")
        return Tasks(names, HarnessSettings(**vars(config.lm_eval)))

    def _config_yaml(self, config: Namespace) -> str:
        """Returns the configuration as YAML that every verb accepts, without the arguments of this one call."""
        saved = config.clone()
        saved.overwrite = False
        text = self._parser(self.subcommand).dump(saved, skip_unset=False)
        return "".join(line for line in text.splitlines(keepends=True) if line.split(":")[0] not in NOT_SAVED)

    def after_instantiate_classes(self) -> None:
        """Checks that the objects go together."""
        assert self.subcommand is not None
        find_callback(self.trainer, DynamicPruningCallback).resume = self.resume
        results = find_callback(self.trainer, ResultsCallback)
        results.format = self.config_init[self.subcommand].format  # instantiated after the callback was made
        check_objects(self.subcommand, self.trainer, self.model, self.datamodule)

    def fit(
        self,
        model: LightningModule,
        datamodule: TextDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Runs ``Trainer.fit``."""
        # callbacks need the path in `setup`; one that is passed to Trainer.fit is not set by then
        if ckpt_path is not None:
            self.trainer.ckpt_path = ckpt_path
        self.trainer.fit(model, datamodule=datamodule, weights_only=weights_only)

    def after_validate(self) -> None:
        """Logs the protocol of the perplexity: its text and windows."""
        self._log_protocol("val")

    def after_test(self) -> None:
        """Logs the protocol of the perplexity: its text and windows."""
        self._log_protocol("test")

    def _log_protocol(self, part: Literal["val", "test"]) -> None:
        log(f"{self.datamodule.describe(part)}; {self.datamodule.windows(part).description}")


def run(args: Sequence[str]) -> None:
    """Parses the command line and runs the verb."""
    _quieten()
    LitPruneCLI(args)


def _quieten() -> None:
    """Silences the progress bars and advice of the libraries; the command prints its own."""
    import datasets

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not any(text in record.getMessage() for text in ADVICE))
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)


def import_subpackages() -> None:
    """Imports all subpackages of lit_prune, whose ``__init__`` import the classes that have short names."""
    for module in pkgutil.iter_modules(lit_prune.__path__, "lit_prune."):
        if module.ispkg and module.name != "lit_prune.cli":
            importlib.import_module(module.name)


import_subpackages()  # jsonargparse resolves the short name of a class that has been imported
