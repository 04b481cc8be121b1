"""Refuses options on the command line that have no effect for the verb; a configuration file may serve several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jsonargparse import Namespace

from lit_prune.errors import InputError

CUT = ("method", "sparsity", "allocation", "budget", "target_", "reconstruction", "min_rate", "max_rate", "statistics")
OPTIONS_OF_A_CUT = tuple(f"--pruning.{name}" for name in CUT)
OPTIONS_OF_TRAINING = (
    *(f"--pruning.{name}" for name in ("before", "recovery", "distillation", "at_step", "schedule")),
    *(f"--trainer.max_{name}" for name in ("steps", "epochs", "time")),
    "--checkpoint_every",
)
MEASURE = ("validate", "test", "evaluate")


def option_values(args: Sequence[str]) -> dict[str, str]:
    """Returns the options of a command line with their values; empty for one without.

    >>> option_values(["fit", "--output=x", "--pruning.sparsity", "0.5", "--overwrite"])
    {'--output': 'x', '--pruning.sparsity': '0.5', '--overwrite': ''}
    """
    values = {}
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        option, is_set, value = arg.partition("=")
        if option.startswith("-"):
            values[option] = value if is_set else following.partition("--")[0]
    return values


def check_effects(args: Sequence[str], verb: str, method: Namespace | None) -> None:
    """Raises InputError for an option that was given and has no effect for ``verb``.

    Args:
        args: The command line.
        verb: Its verb.
        method: The setting `pruning.method`.
    """
    values = option_values(args)
    if verb in MEASURE and (given := _first(values, ("--pruning.", "--format", "--export."))):
        raise InputError(f"`{given}` must be left out for {verb}, which measures a model as it is.")
    if verb in ("prune", "score") and (given := _first(values, OPTIONS_OF_TRAINING)):
        raise InputError(f"`{given}` must be left out for {verb}, which does not train: use `lit-prune fit`.")
    if verb == "fit" and method is None and (given := _first(values, OPTIONS_OF_A_CUT)):
        raise InputError(
            f"`{given}` must be left out without `pruning.method`, which is null, so that nothing is cut: add "
            "`--pruning.method MLPWidth`, or another."
        )


def _first(values: Mapping[str, str], prefixes: tuple[str, ...]) -> str | None:
    """Returns the name of the first option with one of the prefixes and a value other than null."""
    named = (option for option, value in values.items() if option.startswith(prefixes) and value != "null")
    return next((option.removeprefix("--") for option in named), None)
