"""Fills in what the command line leaves out: allocation, window lengths, checkpoint, export's settings, upper case."""

from __future__ import annotations

import pydoc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from lit_prune.allocate import Allocation
from lit_prune.calibration.windows import CALIBRATION_TOKENS
from lit_prune.data.datamodule import WINDOW_TOKENS
from lit_prune.errors import InputError
from lit_prune.export.formats import ExportFormat
from lit_prune.models.load import architecture_config, load_config

CUT = (
    *("method", "sparsity", "allocation", "budget", "target_", "targets", "ignore", "reconstruction", "min_rate"),
    *("max_rate", "statistics", "schedule"),
)
OPTIONS_OF_A_CUT = tuple(f"--pruning.{name}" for name in CUT)
FORMAT_OPTIONS = ("--format", "--format.help")


def fill_lengths(config: Namespace) -> None:
    """Sets window lengths that were not given to their defaults, or to the model's maximum length if that is less."""
    defaults = {"data.seq_length": WINDOW_TOKENS, "pruning.calibration.seq_length": CALIBRATION_TOKENS}
    missing = [field for field in defaults if config[field] is None]
    if not missing:
        return
    model = config.model
    if model.architecture is None:
        llm = load_config(model.pretrained, model.trust_remote_code)
    else:
        llm = architecture_config(model.architecture)
    limit = getattr(llm.get_text_config(), "max_position_embeddings", None)
    for field in missing:
        config[field] = min(defaults[field], limit or defaults[field])


def option_values(args: Sequence[str]) -> dict[str, str]:
    """Returns the options of a command line with their values; empty for one without.

    >>> option_values(["fit", "--output=x", "--pruning.sparsity", "0.5", "--overwrite"])
    {'--output': 'x', '--pruning.sparsity': '0.5', '--overwrite': ''}
    """
    values = {}
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        option, is_set, value = arg.partition("=")
        if option.startswith("-"):
            values[option] = value if is_set else "" if following.startswith("--") else following
    return values


def export_arguments(args: Sequence[str], output: str) -> list[str]:
    """Returns ``args``; for ``export`` with a value for a bare --merge, and --config with the config.yaml of the run.

    Args:
        args: The command line.
        output: The default of ``--output``.

    Raises:
        InputError: for an export of nothing, and for settings of a cut, which the export of a model does not make.
    """
    if args[0] != "export":
        return list(args)
    values = option_values(args)
    args = ["--merge=true" if arg == "--merge" and not values[arg] else arg for arg in args]
    if not {"--ckpt_path", "--model.pretrained", "--config", "-c", "--help", "-h", "--print_config"} & values.keys():
        raise InputError(
            "`model.pretrained` or `ckpt_path` must be given: add `--model.pretrained FOLDER`, or `--ckpt_path FILE` "
            "for a checkpoint of a fit."
        )
    if "--ckpt_path" not in values:
        _check_no_cut(values)
    is_last = values.get("--ckpt_path") == "last"
    run = Path(values.get("--output", output)) if is_last else Path(values.get("--ckpt_path", "")).parent.parent
    run = run.expanduser()
    if {"--config", "-c"} & values.keys() or "--ckpt_path" not in values or not (run / "config.yaml").is_file():
        return args
    # config.yaml names the folder that it was written to, which may have been moved since
    output_option = [f"--output={run}"] if is_last else []
    return ["export", f"--config={run / 'config.yaml'}", *output_option, *args[1:]]


def _check_no_cut(values: Mapping[str, str]) -> None:
    """Raises InputError if the command line of an export without a checkpoint cuts the model."""
    given = first_given(values, OPTIONS_OF_A_CUT)
    config = values.get("--config", values.get("-c"))
    remedy = "cut it by `lit-prune prune`, with the same `--format`"
    if given is not None:
        raise InputError(f"`{given}` must be left out for export, which writes a model as it is: {remedy}.")
    if config is not None and "--model.pretrained" not in values and _has_cut(config):
        raise InputError(
            f"`model.pretrained` must be given: {config} has a cut, and export would write the model before it. Add "
            f"`--model.pretrained FOLDER` for the result of its run, or `--ckpt_path last`, or {remedy}."
        )


def _has_cut(path: str) -> bool:
    """Returns whether a configuration file has settings of a cut; False for a file that cannot be read."""
    settings = _pruning_of(path)
    return isinstance(settings, dict) and settings.get("method", "the default") is not None


def _pruning_of(path: str) -> Any:
    """Returns `pruning` in a configuration file: settings, the path of a file of them, or None without any."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # the parser says what is wrong with it
    return content.get("pruning") if isinstance(content, dict) else None


def allocation_arguments(args: Sequence[str]) -> list[str]:
    """Returns ``args``; with settings of ``--pruning.allocation`` also its name, which a later argument may replace.

    That is DLP, the only default of a method that has settings.
    """
    has_settings = any(arg.startswith("--pruning.allocation.") for arg in args)
    return [args[0], "--pruning.allocation=DLP", *args[1:]] if has_settings else list(args)


def check_allocation_named(args: Sequence[str], method: Namespace | None) -> None:
    """Raises InputError for settings of an allocation that is not named, if the default of ``method`` is not DLP.

    It may be named on the command line or in a configuration file.
    """
    values = option_values(args)
    given = next((name for name in sorted(values) if name.startswith("--pruning.allocation.")), None)
    if method is None or given is None or values.keys() & {"--pruning.allocation", "--pruning"}:
        return
    default = default_allocation(method).rpartition(".")[2]
    if default != "DLP" and not any(_may_name_allocation(path) for path in _configurations(args)):
        raise InputError(
            f"`pruning.allocation` must be named for `{given.removeprefix('--')}`: the default for "
            f"{method.class_path.rpartition('.')[2]} is {default}. Add `--pruning.allocation DLP`, or another."
        )


def _may_name_allocation(path: str) -> bool:
    """Returns whether a configuration file names an allocation, or has the settings of `pruning` in another file."""
    settings = _pruning_of(path)
    return bool(settings.get("allocation") if isinstance(settings, dict) else settings)


def _configurations(args: Sequence[str]) -> list[str]:
    """Returns the paths of all configuration files of a command line."""
    options = (option_values(option) for option in _options(args))
    return [value for option in options for name, value in option.items() if name in ("--config", "-c")]


def default_allocation(method: Namespace) -> str:
    """Returns the dotted path of the default allocation of ``method``, a class and its arguments."""
    kind: Any = pydoc.locate(method.class_path)
    allocation: type[Allocation] = kind.default_allocation()
    room = allocation.__module__
    return f"{'lit_prune' if room.startswith('lit_prune.') else room}.{allocation.__qualname__}"


def settings_last(args: Sequence[str]) -> list[str]:
    """Returns ``args`` with the settings of a class right behind its name, if they were given before it.

    >>> settings_last(["fit", "--format.outtype", "q8_0", "--config", "run.yaml", "--format", "GGUF"])
    ['fit', '--config', 'run.yaml', '--format', 'GGUF', '--format.outtype', 'q8_0']
    """
    ordered: list[list[str]] = []
    for option in _options(args):
        name = option[0].partition("=")[0]
        settings: list[list[str]] = []
        # a group such as `--model` is no class, and a second name replaces the first
        if (name == "--format" or "." in name) and all(other[0].partition("=")[0] != name for other in ordered):
            settings = [other for other in ordered if other[0].startswith(f"{name}.")]
            ordered = [other for other in ordered if not other[0].startswith(f"{name}.")]
        ordered += [option, *settings]
    return [arg for option in ordered for arg in option]


def _options(args: Sequence[str]) -> list[list[str]]:
    """Returns the options of a command line, each with its values, behind the verb."""
    options: list[list[str]] = []
    for arg in args:
        if arg.startswith("--") or arg.partition("=")[0] == "-c" or not options:
            options.append([])
        options[-1].append(arg)
    return options


def first_given(values: Mapping[str, str], prefixes: tuple[str, ...]) -> str | None:
    """Returns the name of the first option with one of the prefixes and a value other than null; None without one."""
    named = (option for option, value in values.items() if option.startswith(prefixes) and not _is_null(value))
    return next((option.removeprefix("--") for option in named), None)


def _is_null(value: str) -> bool:
    try:
        return bool(value) and yaml.safe_load(value) is None
    except yaml.YAMLError:
        return False


def spell_format(args: Sequence[str]) -> list[str]:
    """Returns ``args`` with the value of ``--format`` in the case of the class that it names: gguf becomes GGUF.

    So with the value of ``--format.help``.
    """
    classes = {kind.__name__.casefold(): kind.__name__ for kind in ExportFormat.__subclasses__()}
    spelled = list(args)
    for index, arg in enumerate(args):
        option, is_set, value = arg.partition("=")
        if option in FORMAT_OPTIONS and is_set:
            spelled[index] = f"{option}={classes.get(value.casefold(), value)}"
        elif option in FORMAT_OPTIONS and index + 1 < len(args):
            spelled[index + 1] = classes.get(args[index + 1].casefold(), args[index + 1])
    return spelled


def find_checkpoint(path: str, output: Path) -> str:
    """Returns the path of a checkpoint; ``last`` stands for the last one in the output folder.

    Raises:
        InputError: if the file does not exist; Lightning would warn and start from scratch.
    """
    checkpoint = output / "checkpoints" / "last.ckpt" if path == "last" else Path(path).expanduser()
    if not checkpoint.is_file():
        raise InputError(f"`ckpt_path` must be an existing checkpoint, or last, got {checkpoint}.")
    return str(checkpoint)
