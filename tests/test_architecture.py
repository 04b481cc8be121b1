"""The tree: rooms on floors, leaves that know their base alone, callbacks that only the command looks at.

All of it is read off the files; nothing is listed by hand. ``python -m tests.test_architecture`` prints the floors.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "lit_prune"
MOST_FILES = 10


def modules() -> dict[str, Path]:
    """The modules of the package by their dotted names; the folder callbacks/ is installed as lit_prune.callbacks."""
    files = {path.relative_to(ROOT): path for path in (ROOT / PACKAGE).rglob("*.py")}
    files |= {Path(PACKAGE) / path.relative_to(ROOT): path for path in (ROOT / "callbacks").glob("*.py")}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for name, path in files.items()}


def room(module: str) -> str:
    """The folder of a module below the package; a file at the root is a room of its own."""
    return [*module.split("."), PACKAGE][1]


def imports(nodes: list[ast.AST], known: dict[str, Path]) -> set[str]:
    """The modules of the package that ``nodes`` import."""
    used = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            used |= {name if name in known else node.module for name in names}
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
    return used & known.keys()


def graph() -> dict[str, set[str]]:
    """By module, the modules that it imports, wherever in the file."""
    known = modules()
    return {name: imports(list(ast.walk(ast.parse(path.read_text()))), known) for name, path in known.items()}


def rooms() -> dict[str, set[str]]:
    """By room, the rooms that it imports; the package's own __init__, which hands names on, is left out."""
    between: dict[str, set[str]] = {}
    for name, used in graph().items():
        if name != PACKAGE:
            others = {room(other) for other in used if other != PACKAGE}
            between[room(name)] = between.get(room(name), set()) | others - {room(name)}
    return between


def floors() -> dict[str, int]:
    """By room, the length of the longest way down from it; raises CycleError for a circle."""
    between, heights = rooms(), dict[str, int]()
    for name in graphlib.TopologicalSorter(between).static_order():
        heights[name] = max((heights[below] + 1 for below in between[name]), default=0)
    return heights


def classes(module: str) -> list[ast.ClassDef]:
    """The classes of a module."""
    return [node for node in ast.parse(modules()[module].read_text()).body if isinstance(node, ast.ClassDef)]


def names(nodes: list[ast.expr]) -> set[str]:
    """The plain names among decorators, or among the classes that another derives from."""
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def leaves(folder: str) -> set[str]:
    """The modules that an __init__ hands on with classes below one of the folder, from which none there derives."""
    known = modules()
    public = imports(list(ast.walk(ast.parse(known[folder].read_text()))), known)
    beside = {name: classes(name) for name in public | {f"{folder}.base"}}
    every = [node for found in beside.values() for node in found]
    derived = {kind for node in every for kind in names(node.bases)}
    bases = {node.name for node in every if "final" not in names(node.decorator_list)} & derived
    own = {node.name for node in every}
    below = {name for name, found in beside.items() if any(own & names(node.bases) for node in found)}
    return {name for name in below if not bases & {node.name for node in beside[name]}}


def test_modules_import_in_no_circle() -> None:
    list(graphlib.TopologicalSorter(graph()).static_order())


def test_rooms_stand_on_floors() -> None:
    heights = floors()
    assert heights["models"] < heights["calibration"] < heights["pruning"] < heights["pipeline"] < heights["fit"]
    assert heights["cli"] == max(heights.values())


def test_only_the_command_looks_at_the_callbacks() -> None:
    assert {name for name, used in rooms().items() if "callbacks" in used} == {"cli"}


def test_leaves_import_their_base_and_never_each_other() -> None:
    known = modules()
    folders = [name.removesuffix(".base") for name in known if name.endswith(".base")]
    assert len(folders) >= 4
    for folder in folders:
        beside = leaves(folder)
        assert beside, folder
        for name in beside:
            used = imports(list(ast.parse(known[name].read_text()).body), known)
            assert not used & beside, (name, used & beside)


def test_a_room_is_seen_at_a_glance() -> None:
    count: dict[Path, int] = {}
    for path in modules().values():
        if not path.name.startswith("__"):
            count[path.parent] = count.get(path.parent, 0) + 1
    assert not {str(folder): files for folder, files in count.items() if files > MOST_FILES}


def test_every_source_file_has_its_test_file() -> None:
    missing = [
        name
        for name, path in modules().items()
        if not path.name.startswith("__") and not mirrored(name.removeprefix(f"{PACKAGE}.")).exists()
    ]
    assert not missing


def mirrored(name: str) -> Path:
    """The test file of a module, given by its name below the package."""
    *folders, last = name.split(".")
    return ROOT.joinpath("tests", *folders, f"test_{last}.py")


def test_what_is_packaged_is_what_there_is() -> None:
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{package}"' in text for package in packages)


if __name__ == "__main__":
    by_floor: dict[int, list[str]] = {}
    for name, floor in floors().items():
        by_floor.setdefault(floor, []).append(name)
    for floor in sorted(by_floor, reverse=True):
        print(f"{floor:2}  {'  '.join(sorted(by_floor[floor]))}")
