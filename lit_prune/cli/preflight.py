"""What the command line leaves open, and what is wrong with it before it is parsed: verbs, checkpoints, lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lit_prune.calibration.windows import CALIBRATION_TOKENS
from lit_prune.data.datamodule import WINDOW_TOKENS
from lit_prune.errors import InputError
from lit_prune.models.load import architecture_config, load_config

WRITES = ("fit", "prune", "export")  # verbs that leave a model


def check_verb(args: list[str], verbs: dict[str, Any]) -> None:
    """Refuses options before the verb, and tasks for a verb that asks none; a configuration may name some."""
    verb = next((arg for arg in args if arg in verbs), None)
    options = {arg.partition("=")[0] for arg in args}
    if verb is not None and args[0].startswith("-"):
        before = " ".join(args[: args.index(verb)])
        raise InputError(f"the verb must come first: lit-prune {verb} {before}")
    if verb not in (None, *WRITES, "evaluate") and "--tasks" in options:
        raise InputError(
            f"`tasks` must be left out for {verb}, which asks none: use `lit-prune evaluate`, or fit, prune and export."
        )


def fill_lengths(config: Namespace) -> None:
    """Sets the windows that the user left open, as long as the model takes."""
    usual = {"data.seq_length": WINDOW_TOKENS, "pruning.calibration.seq_length": CALIBRATION_TOKENS}
    missing = [field for field in usual if config[field] is None]
    if not missing:
        return
    model = config.model
    found = load_config(model.pretrained) if model.architecture is None else architecture_config(model.architecture)
    for field in missing:
        config[field] = min(usual[field], getattr(found, "max_position_embeddings", None) or usual[field])


def of_export(args: list[str], output: str) -> list[str]:
    """Returns the arguments with what `export` may leave out: the value of --merge, and its run's config.yaml.

    Args:
        args: As the user gave them.
        output: The folder of results where none is given.
    """
    if args[:1] != ["export"]:
        return args
    given = {}
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        option, is_set, value = arg.partition("=")
        given[option] = value if is_set else following
    args = ["--merge=true" if arg == "--merge" and given[arg][:2] in ("", "--") else arg for arg in args]
    last = given.get("--ckpt_path") == "last"
    run = Path(given.get("--output", output)) if last else Path(given.get("--ckpt_path", "")).parent.parent
    if {"--config", "-c"} & given.keys() or not (run / "config.yaml").is_file():
        return args
    here = [f"--output={run}"] if last else []  # which the folder may have been moved to
    return ["export", f"--config={run / 'config.yaml'}", *here, *args[1:]]


def found_checkpoint(path: str, output: Path) -> str:
    """Returns the checkpoint to resume from; Lightning itself would start afresh where there is none."""
    found = output / "checkpoints" / "last.ckpt" if path == "last" else Path(path)
    if not found.is_file():
        raise InputError(f"`ckpt_path` must be a checkpoint that is there, {found} is not.")
    return str(found)
