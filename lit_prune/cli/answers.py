"""Replies that need neither torch nor Lightning: the version, the list of verbs, and errors in verbs and options."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

from lit_prune.cli.signatures import (
    CLASS_OPTIONS,
    DESCRIPTION,
    FOLDER_VERBS,
    VERBS,
    WRITES,
    options,
    suggestions,
    summary,
)
from lit_prune.errors import InputError, near_misses

VERSIONS = ("torch", "lightning", "transformers", "peft")


def answer(args: Sequence[str]) -> str | None:
    """Returns what ``lit-prune`` prints for ``--version`` and ``--help``; None if a verb has to run.

    Raises:
        InputError: for an unknown verb or option, options before the verb, and options that the verb does not take.
    """
    if args[:1] == ["--version"]:
        return version()
    if args[:1] in (["--help"], ["-h"]):
        return usage()
    check_verb(args)
    if args[0] not in FOLDER_VERBS:
        check_options(args)
    return None


def version() -> str:
    """Returns the versions of lit-prune and of the libraries that a bug report should name."""
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    return f"lit-prune {importlib.metadata.version('lit-prune')} ({libraries})"


def usage() -> str:
    """Returns the help of the command, which lists the verbs, each with its summary."""
    summaries = {verb: summary(verb) for verb in VERBS} | FOLDER_VERBS
    verbs = "\n".join(f"  {verb:<10} {text}" for verb, text in summaries.items())
    return (
        f"usage: lit-prune VERB [--config FILE] [options]\n\n{DESCRIPTION}\n\nverbs:\n{verbs}\n\n"
        "options:\n  --version  Print the versions of lit-prune and of the main libraries.\n"
        "  --help     Print this message; `lit-prune fit --help` lists the options of fit."
    )


def check_verb(args: Sequence[str]) -> None:
    """Raises InputError for a missing or unknown verb, options before the verb, and `--tasks` where none are run."""
    verbs = (*VERBS, *FOLDER_VERBS)
    verb = next((arg for arg in args if arg in verbs), None)
    if verb is not None and args[0].startswith("-"):
        options_before = " ".join(args[: args.index(verb)])
        raise InputError(f"the verb must come first: lit-prune {verb} {options_before}")
    if args[:1] != [verb]:
        got = f", got {args[0]!r}" if args else ""
        near = near_misses(args[0], verbs) if args else []
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"the verb must be one of {', '.join(verbs)}{got}.{hint}")
    if verb not in (*WRITES, "evaluate") and "--tasks" in {_name(arg) for arg in args}:
        raise InputError(
            f"`tasks` must be left out for {verb}, which runs no tasks: use `lit-prune evaluate`, or fit, prune and "
            "export."
        )


def check_options(args: Sequence[str]) -> None:
    """Raises InputError for an unknown option; the settings of a class given by name are left to the full parser."""
    try:
        known = options(args[0])
    except LookupError:  # a library whose source is laid out differently: the full parser finds the mistake
        return
    for arg in args[1:]:
        name = _name(arg)
        first_two = ".".join(name.split(".")[:2])
        nested = name.split(".")[0] in CLASS_OPTIONS or first_two.endswith(".help")
        if not name.startswith("--") or first_two in known or nested:
            continue
        near = suggestions(name, args[0])
        hint = f" Did you mean {' or '.join(near)}?" if near else f" (see lit-prune {args[0]} --help)"
        raise InputError(f"`{name}` is not an option.{hint}")


def _name(arg: str) -> str:
    """Returns the name of the option that ``arg`` sets; in ``--trainer.callbacks+=X`` the plus appends to a list."""
    return arg.partition("=")[0].removesuffix("+")
