"""jsonargparse's error messages, reduced to a line or two: what is wrong, close matches, and the choices.

jsonargparse reports a wrong class name or option with every type that it tried and the whole value. Regular
expressions extract the parts that matter; a message that none of them matches is shortened, not hidden.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_prune.allocate import Allocation
from lit_prune.distill import Distillation
from lit_prune.distill.base import Teacher
from lit_prune.errors import near_misses
from lit_prune.export.formats import ExportFormat
from lit_prune.files import disk_error
from lit_prune.pruning import Method, Pattern
from lit_prune.reconstruct import Reconstruct
from lit_prune.recover import Recovery
from lit_prune.schedule import Schedule

BASES: dict[str, type] = {
    "method": Method,
    "parts": Method,
    "allocation": Allocation,
    "before": Recovery,
    "start": Allocation,
    "recovery": Recovery,
    "reconstruction": Reconstruct,
    "distillation": Distillation,
    "teacher": Teacher,
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


def one_line(error: Exception) -> str | None:
    """Returns a one-line message for an exception that the user can mend; None for any other."""
    if isinstance(error, MisconfigurationException):
        return str(error).splitlines()[0]
    if isinstance(error, ValueError) and "Union subtypes" in str(error):
        # jsonargparse wraps the error of a class if its field may be of several types
        if wrapped := re.search(r"^\s*- (`.+)$", str(error), re.MULTILINE):
            return wrapped.group(1)
        refused = re.search(r"Problem with given class_path '[\w.]*?(\w+)':\s+(.+)", str(error))
        return refused and _refused(*refused.groups())
    if (reason := disk_error(error)) is not None:
        return f"`output` must be on a disk with free space: {reason}. Free some, or choose another `--output DIR`."
    return None


def _refused(name: str, reason: str) -> str:
    """Returns the message about a class of Lightning that rejects its settings, or lacks the package that it needs."""
    package = re.match(r"Requirement '(.+?)' not met", reason)
    if package:
        return f"`{name}` needs a package that is not installed: pip install '{package.group(1)}'."
    return f"`{name}` must have settings that it accepts: {reason}"


def with_options(message: str, config: Namespace) -> str:
    """Returns ``message`` with the options of those fields that it names by their class, as Python users know them.

    `DLP.alpha` becomes `pruning.allocation.alpha`, and `calibration.seed` becomes `pruning.calibration.seed`. A class
    that ``config`` has at several options, or in a list, keeps its name.
    """
    options: dict[str, list[str]] = {}
    for field, option in _fields(config):
        options.setdefault(field, []).append(option)

    def replaced(match: re.Match[str]) -> str:
        found = options.get(match[1], [])
        return f"`{found[0]}`" if len(found) == 1 else match[0]

    return re.sub(r"`(\w+\.\w+)`", replaced, message)


def _fields(config: Namespace, parent: str = "") -> Iterator[tuple[str, str]]:
    """Yields every setting of a class or group in ``config``: its field, as `DLP.alpha`, and its option."""
    for name, value in vars(config).items():
        if isinstance(value, Namespace):
            class_path = value.get("class_path")
            owner, option = (class_path or name).rsplit(".", 1)[-1], f"{parent}{name}"
            settings = value.get("init_args", Namespace()) if class_path else value
            yield from ((f"{owner}.{field}", f"{option}.{field}") for field in vars(settings))
            yield from _fields(settings, f"{option}.")


def explain(message: str, parser: Any) -> str:
    """Returns ``message`` in a line or two.

    Args:
        message: The message of jsonargparse.
        parser: The parser that raised it, whose options are the choices.
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
        (r"Problems parsing config: ([^\n]+)", _no_yaml),
        (r"Problem with given class_path '([\w.]+)':\s+the following arguments are required: (\S+)", _required),
        (r"^the following arguments are required: \w+\.(\w+)$", _required_option),
        (r"argument subcommand: invalid choice: '(\S+)'|expected \"subcommand\" to be one of", _verb),
        (r"(?:Got value|Given value): (?!NestedArg)(.*)", _value),
    ):
        match = re.search(pattern, message, re.DOTALL if pattern.startswith(r"Problem") else 0)
        if match and (text := describe(match, message, parser)):
            return text
    return _shortened(message)


def _where(message: str, end: int | None = None) -> str:
    """Returns the full key, as the user types it, that ``message`` is about right before position ``end``.

    jsonargparse indents the message about a nested key under those about its parents.
    """
    parents: list[tuple[int, str]] = []
    for match in re.finditer(r"[Pp]arser key \"([\w.]+)\"|argument (--[\w.]+)", message[:end]):
        column = match.start() - message.rfind("\n", 0, match.start())
        parents = [parent for parent in parents if parent[0] < column] + [(column, match.group(1) or match.group(2))]
    return ".".join(key for _, key in parents)


def _options(parser: Any) -> list[str]:
    parsers = [parser, *(sub for sub in _subparsers(parser).values())]
    return sorted({s for p in parsers for action in p._actions for s in action.option_strings if s.startswith("--")})


def _subparsers(parser: Any) -> dict[str, Any]:
    return next((dict(a._name_parser_map) for a in parser._actions if hasattr(a, "_name_parser_map")), {})


def _option(match: re.Match[str], message: str, parser: Any) -> str:
    word = match.group(1).split()[0].split("=")[0]
    return _not_known(f"`{word}` is not an option", word, _options(parser), "see --help")


def _key(match: re.Match[str], message: str, parser: Any) -> str:
    inner = match.group(1)
    where = _where(message, match.start())
    full = inner if not where or inner.startswith(where) else f"{where}.{inner}"
    known = [option.removeprefix("--") for option in _options(parser)]
    group = full.split(".")[0]
    groups = sorted({option.split(".")[0] for option in known})
    if group not in groups:
        return _not_known(f"`{full}` is not a setting: there is no group `{group}`", group, groups)
    return _not_known(f"`{full}` is not a setting", full, known, "see --help")


def _class_option(match: re.Match[str], message: str, parser: Any) -> str:
    name, option = match.group(1).rsplit(".", 1)[-1], match.group(2)
    leaves = {leaf.__name__: leaf for base in BASES.values() for leaf in (base, *_leaves(base))}
    leaf = leaves.get(name)
    choices = _settings(leaf)
    where = _where(message, match.start())
    remedy = ", ".join(choices)

    def having_it(place: str) -> list[str]:
        return [other for other in _classes(place) if option in _settings(leaves.get(other))]

    if "parts" in choices and (parts := having_it(f"{where}.parts")):
        part = f"{{class_path: {parts[0]}, init_args: {{{option}: ...}}}}"
        remedy = f"for a part, give it among the parts: --{where}.parts '[{part}]'"
    elif others := having_it(where):
        theirs = f"of {' and '.join(others)} it is"
        remedy = theirs if where.endswith("parts") else f"{remedy}{'; ' * bool(remedy)}{theirs}: --{where} {others[0]}"
    return _not_known(f"`{where}.{option}` is not a setting of {name}", option, choices, remedy)


def _settings(kind: type | None) -> list[str]:
    return [field.name for field in fields(kind)] if kind is not None and is_dataclass(kind) else []


def _class(match: re.Match[str], message: str, parser: Any) -> str:
    word, where = next(group for group in match.groups() if group), _where(message, match.start())
    if not (choices := _classes(where)):
        return ""
    return _not_known(
        f"`{where}` must be one of {', '.join(choices)}, or the dotted path of a class of your own, got {word!r}",
        word,
        choices,
        _as_n_of_m(word, where),
    )


def _as_n_of_m(word: str, where: str) -> str:
    """Returns the options that mean a pattern written as 2:4; an empty string for any other word."""
    match = re.fullmatch(r"(\d+):(\d+)", word)
    if match is None or not where.endswith("pattern"):
        return ""
    return f"{word} is --{where} NofM --{where}.n {match[1]} --{where}.m {match[2]}"


def _value(match: re.Match[str], message: str, parser: Any) -> str:
    """Returns the message about a value of the wrong type; the types that jsonargparse tried are the valid ones."""
    value, before = match.group(1).strip(), message[: match.start()]
    tried = before[before.rfind("Parser key") :]  # of the innermost key
    names = re.findall(r"Expected (?:an? )?(?:<class ')?(?:\w+\.)*(\w+)", tried)
    kinds = [WORDS[name] for name in names if name in WORDS]
    choices = re.findall(r"'([^']+)'", " ".join(re.findall(r"Expected a typing\.Literal\[(.*?)\]", tried)))
    kinds += [f"one of {', '.join(choices)}"] if choices else []
    where = _where(message, match.start())
    if not where or not kinds:
        return ""
    hint = ""
    if kinds == [WORDS["list"]] and set(value) & set("[],"):
        hint = "put a list in quotes and brackets: '[A, B]'"
    elif kinds == [WORDS["list"]]:
        hint = f"a list is written [{value}]"
    if re.fullmatch(r"[\d.]+%", value) and WORDS["float"] in kinds:
        hint = f"a share is written {float(value[:-1]) / 100:g}"
    return _not_known(f"`{where}` must be {' or '.join(kinds)}, got {value}", value, choices, hint)


def _abstract(match: re.Match[str], message: str, parser: Any) -> str:
    where = _where(message, match.start())
    return f"`{where}` must be given along with its settings: one of {', '.join(_classes(where))}."


def _classes(where: str) -> list[str]:
    """Returns the short names of this project's classes that the key accepts."""
    base = BASES.get(where.rsplit(".", 1)[-1])
    leaves = [] if base is None else _leaves(base) or [base]
    if where.endswith("parts"):
        leaves = [leaf for leaf in leaves if issubclass(leaf, Method) and leaf.can_be_part]
    return sorted(leaf.__name__ for leaf in leaves if leaf.__module__.startswith("lit_prune."))


def _file(match: re.Match[str], message: str, parser: Any) -> str:
    return f"`--{_where(message) or 'config'}` must be an existing file, got {match.group(1)}."


def _empty(match: re.Match[str], message: str, parser: Any) -> str:
    return "`--config` must be a YAML file of settings, got an empty one."


def _no_yaml(match: re.Match[str], message: str, parser: Any) -> str:
    return f"`--config` must be a YAML file of settings: {match.group(1)}."


def _leaves(base: type) -> list[type]:
    """Returns the concrete subclasses of ``base``, at any depth."""
    children: list[type] = base.__subclasses__()
    concrete = [child for child in children if not inspect.isabstract(child)]
    return concrete + [leaf for child in children for leaf in _leaves(child)]


def _required(match: re.Match[str], message: str, parser: Any) -> str:
    name, option = match.group(1).rsplit(".", 1)[-1], match.group(2)
    return f"`{_where(message, match.start())}.{option}` must be given: {name} needs it."


def _required_option(match: re.Match[str], message: str, parser: Any) -> str:
    return f"`{match.group(1)}` must be given: add `--{match.group(1)}`."


def _verb(match: re.Match[str], message: str, parser: Any) -> str:
    word = match.group(1) or ""
    verbs = list(_subparsers(parser))
    return _not_known(f"the verb must be one of {', '.join(verbs)}" + (f", got {word!r}" if word else ""), word, verbs)


def _not_known(problem: str, word: str, choices: list[str], remedy: str = "") -> str:
    """Returns ``problem`` with the choices that are spelt like ``word``, or with ``remedy`` if there are none."""
    near = near_misses(word, choices)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{problem}.{hint}" + (f" ({remedy})" if remedy and not near else "")


def _shortened(message: str) -> str:
    """Returns the key and the lines of ``message`` that give the expected type and the value."""
    lines = [line.strip(" -") for line in message.splitlines()]
    details = [
        line
        for line in lines
        if re.match(r"Expected|Value|Got|Given value:|Invalid|Unable|Not a|.*No such", line)
        and not re.search("NoneType|NestedArg|^Expected a path but", line)
    ]
    where = _where(message, message.find(details[0]) if details else None)
    if not details or not where:
        return " ".join(line for line in lines if line)[:500]
    text = "; ".join(dict.fromkeys(details)).replace("typing.Literal", "one of ")
    return f"`{where}`: " + re.sub(r"<class '([\w.]+)'>", r"\1", text)[:400]
