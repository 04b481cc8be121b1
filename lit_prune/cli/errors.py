"""Turns what jsonargparse says of a mistake into a few lines: what is wrong, near misses, what there is.

jsonargparse reports a wrong class name or option with every type that was tried and the whole of the value; the lines
that matter are recognised here. What is not recognised is shortened, not hidden.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import Any

from lit_prune.allocate import Allocation
from lit_prune.errors import near_misses
from lit_prune.export.formats import ExportFormat
from lit_prune.prune import Method, Pattern
from lit_prune.recover import Recovery
from lit_prune.schedule import Schedule

BASES: dict[str, type] = {
    "method": Method,
    "allocation": Allocation,
    "before": Recovery,
    "start": Allocation,
    "recovery": Recovery,
    "pattern": Pattern,
    "schedule": Schedule,
    "format": ExportFormat,
}

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "Sequence": "a list",
    "dict": "a mapping",
}


def explain(message: str, parser: Any) -> str:
    """Returns ``message`` in a few lines.

    Args:
        message: What jsonargparse would print.
        parser: The parser it comes from, whose options are the choices.
    """
    for pattern, describe in (
        (r"unrecognized arguments: (.*)", _option),
        (r"Problem with given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", _class_option),
        (r"(?:Key|Group|Option|key) ['\"]([\w.]+)['\"] .*?(?:is not accepted|not found|does not accept)", _key),
        (r"(?:Option '|does not accept option ')([\w.]+)'", _key),
        (r"[Uu]nrecogni[sz]ed (?:keys?|options?|settings?)[^\w]*([\w.]+)", _key),
        (r"Expected a dot import path string: (\S+)", _class),
        (r"Expected an instantiatable class, but ([\w.]+) is abstract", _abstract),
        (r"No import path.*?'(\S+)'|Unexpected import path format: (\S+)", _class),
        (r"File does not exist: '?([^'\n]+)'?", _file),
        (r"Unexpected config:\s*$", _empty),
        (r"Problem with given class_path '([\w.]+)':\s+the following arguments are required: (\S+)", _required),
        (r"argument subcommand: invalid choice: '(\S+)'|expected \"subcommand\" to be one of", _verb),
        (r"(?:Got value|Given value): (?!NestedArg)(.*)", _value),
    ):
        found = re.search(pattern, message, re.DOTALL if pattern.startswith(r"Problem") else 0)
        if found and (told := describe(found, message, parser)):
            return told
    return _shortened(message)


def _where(message: str, end: int | None = None) -> str:
    """The key that a message is about at ``end``, as the user types it: those that stand around it, by indentation."""
    around: list[tuple[int, str]] = []
    for found in re.finditer(r"[Pp]arser key \"([\w.]+)\"|argument (--[\w.]+)", message[:end]):
        column = found.start() - message.rfind("\n", 0, found.start())
        around = [outer for outer in around if outer[0] < column] + [(column, found.group(1) or found.group(2))]
    return ".".join(key for _, key in around)


def _options(parser: Any) -> list[str]:
    parsers = [parser, *(sub for sub in _subparsers(parser).values())]
    return sorted({s for p in parsers for action in p._actions for s in action.option_strings if s.startswith("--")})


def _subparsers(parser: Any) -> dict[str, Any]:
    return next((dict(a._name_parser_map) for a in parser._actions if hasattr(a, "_name_parser_map")), {})


def _option(found: re.Match[str], message: str, parser: Any) -> str:
    word = found.group(1).split()[0].split("=")[0]
    return _not_known(f"`{word}` is not an option", word, _options(parser), "see --help")


def _key(found: re.Match[str], message: str, parser: Any) -> str:
    inner = found.group(1)
    where = _where(message, found.start())
    full = inner if not where or inner.startswith(where) else f"{where}.{inner}"
    known = [option.removeprefix("--") for option in _options(parser)]
    group = full.split(".")[0]
    groups = sorted({option.split(".")[0] for option in known})
    if group not in groups:
        return _not_known(f"`{full}` is not a setting: there is no group `{group}`", group, groups)
    return _not_known(f"`{full}` is not a setting", full, known, "see --help")


def _class_option(found: re.Match[str], message: str, parser: Any) -> str:
    name, option = found.group(1).rsplit(".", 1)[-1], found.group(2)
    leaves = {leaf.__name__: leaf for base in BASES.values() for leaf in _leaves(base)}
    leaf = leaves.get(name)
    choices = [field.name for field in fields(leaf)] if leaf is not None and is_dataclass(leaf) else []
    return _not_known(
        f"`{_where(message, found.start())}.{option}` is not a setting of {name}", option, choices, ", ".join(choices)
    )


def _class(found: re.Match[str], message: str, parser: Any) -> str:
    word, where = next(group for group in found.groups() if group), _where(message, found.start())
    if not (choices := _classes(where)):
        return ""
    return _not_known(
        f"`{where}` must be one of {', '.join(choices)}, or the dotted path of a class of your own, got {word!r}",
        word,
        choices,
        _as_n_of_m(word, where),
    )


def _as_n_of_m(word: str, where: str) -> str:
    """How a pattern such as 2:4 is written."""
    found = re.fullmatch(r"(\d+):(\d+)", word)
    if found is None or not where.endswith("pattern"):
        return ""
    return f"{word} is --{where} NofM --{where}.n {found[1]} --{where}.m {found[2]}"


def _value(found: re.Match[str], message: str, parser: Any) -> str:
    """What kind of value a setting takes, of those that were tried for it."""
    value, before = found.group(1).strip(), message[: found.start()]
    tried = before[before.rfind("Parser key") :]  # of the innermost key
    kinds = [WORDS[name] for name in re.findall(r"Expected an? <class '(?:[\w]+\.)*(\w+)'>", tried) if name in WORDS]
    choices = re.findall(r"'([^']+)'", " ".join(re.findall(r"Expected a typing\.Literal\[(.*?)\]", tried)))
    kinds += [f"one of {', '.join(choices)}"] if choices else []
    where = _where(message, found.start())
    if not where or not kinds:
        return ""
    hint = f"a list is written [{value}]" if kinds == [WORDS["list"]] else ""
    if re.fullmatch(r"[\d.]+%", value) and WORDS["float"] in kinds:
        hint = f"a share is written {float(value[:-1]) / 100:g}"
    return _not_known(f"`{where}` must be {' or '.join(kinds)}, got {value}", value, choices, hint)


def _abstract(found: re.Match[str], message: str, parser: Any) -> str:
    where = _where(message, found.start())
    return f"`{where}` must be given before its settings are: one of {', '.join(_classes(where))}."


def _classes(where: str) -> list[str]:
    """The short names of our classes that the key takes."""
    base = BASES.get(where.rsplit(".", 1)[-1])
    leaves = [] if base is None else _leaves(base)
    return sorted(leaf.__name__ for leaf in leaves if leaf.__module__.startswith("lit_prune."))


def _file(found: re.Match[str], message: str, parser: Any) -> str:
    return f"`--{_where(message) or 'config'}` must be a file that is there, got {found.group(1)}."


def _empty(found: re.Match[str], message: str, parser: Any) -> str:
    return "`--config` must be a YAML file of settings, got an empty one."


def _leaves(base: type) -> list[type]:
    """The concrete classes under ``base``, at any depth."""
    below: list[type] = base.__subclasses__()
    return [kind for kind in below if not inspect.isabstract(kind)] + [leaf for kind in below for leaf in _leaves(kind)]


def _required(found: re.Match[str], message: str, parser: Any) -> str:
    name, option = found.group(1).rsplit(".", 1)[-1], found.group(2)
    return f"`{_where(message, found.start())}.{option}` must be given: {name} needs it."


def _verb(found: re.Match[str], message: str, parser: Any) -> str:
    word = found.group(1) or ""
    verbs = list(_subparsers(parser))
    return _not_known(f"the verb must be one of {', '.join(verbs)}" + (f", got {word!r}" if word else ""), word, verbs)


def _not_known(what: str, word: str, choices: list[str], remedy: str = "") -> str:
    near = near_misses(word, choices)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{what}.{hint}" + (f" ({remedy})" if remedy and not near else "")


def _shortened(message: str) -> str:
    """The key, and the lines that say what was expected and what came."""
    lines = [line.strip(" -") for line in message.splitlines()]
    told = [line for line in lines if re.match(r"Expected|Value|Got|Given value:|Invalid|Unable|Not a|.*No such", line)]
    told = [line for line in told if not re.search("NoneType|NestedArg|^Expected a path but", line)]
    where = _where(message, message.find(told[0]) if told else None)
    if not told or not where:
        return " ".join(line for line in lines if line)[:500]
    text = "; ".join(dict.fromkeys(told)).replace("typing.Literal", "one of ")
    return f"`{where}`: " + re.sub(r"<class '([\w.]+)'>", r"\1", text)[:400]
