"""The tree's direction: no cycles, leaves import their base alone, only cli.py looks at the callbacks."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAGES = ("allocate", "prune", "recover", "distill")
SHARED = {  # what leaves may import beside them
    *("base", "metric", "patterns"),
    *("adapter", "held", "masked_linear", "masked_quantised", "quantise"),
    *("loss", "twin"),
}
MADE_OF = {  # a leaf that begins with another one, what has one as its default, what puts the parts together
    "lit_prune.allocate.search": {"lit_prune.allocate.dlp"},
    "lit_prune.distill.distillation": {"lit_prune.distill.copies"},
    "lit_prune.distill.hook": {"lit_prune.distill.distillation"},
}


def modules() -> dict[str, Path]:
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "lit_prune").rglob("*.py")
    }
    for path in (ROOT / "callbacks").glob("*.py"):
        found[f"lit_prune.callbacks.{path.stem}".removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lit_prune"):
            found |= {
                f"{node.module}.{alias.name}" if node.module == "lit_prune" else node.module for alias in node.names
            }
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("lit_prune")}
    return {name for name in found if name in known}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) for name, path in known.items()}


def test_there_is_no_cycle() -> None:
    order = list(graphlib.TopologicalSorter(graph()).static_order())
    assert (
        order.index("lit_prune.models.families")
        < order.index("lit_prune.calibration.stream")
        < order.index("lit_prune.pipeline")
    )
    assert order.index("lit_prune.pipeline") < order.index("lit_prune.cli")


def test_only_the_command_looks_at_the_callbacks() -> None:
    for name, used in graph().items():
        if name != "lit_prune.cli" and not name.startswith("lit_prune.callbacks"):
            assert not {other for other in used if other.startswith("lit_prune.callbacks")}, name


def test_leaves_import_their_base_and_never_each_other() -> None:
    for name, used in graph().items():
        parts = name.split(".")
        if len(parts) == 3 and parts[1] in STAGES:
            siblings = {other for other in used if other.startswith(f"lit_prune.{parts[1]}.")}
            shared = {f"lit_prune.{parts[1]}.{base}" for base in SHARED}
            assert siblings <= shared | MADE_OF.get(name, set()), name


def test_what_is_packaged_is_what_there_is() -> None:
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{package}"' in text for package in packages)
