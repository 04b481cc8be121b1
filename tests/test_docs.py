"""Every command of README and docs is one that the command line takes, and runs; every snippet of Python runs."""

import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lit_prune.cli.main import main
from lit_prune.cli.parser import LitPruneCLI
from tests.callbacks.test_dynamic_pruning import Foreign
from tests.conftest import small_model

ROOT = Path(__file__).parent.parent
PAGES = {
    path.stem: path for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
QUICK = [
    "--data.val_windows=2",
    "--data.seq_length=64",
    "--data.val_seq_length=64",
    "--pruning.calibration.num_samples=2",
    "--pruning.calibration.seq_length=64",
]
STANDING = {"FOLDER": "embedded", "CONFIG": "configs/quickstart.yaml"}  # what a page leaves to its reader
DEFAULT_OUTPUT = "runs/lit_prune"
OWN = ("prune_then_finetune", "evaluation")  # run by tests/test_workflow_docs.py
ELSEWHERE = ("--push_to_hub", "--trainer.devices", "--tasks")  # what a test cannot have, or has a test of its own


def commands(page: str) -> list[list[str]]:
    """The `lit-prune` commands of a page, in order, each as arguments."""
    text = PAGES[page].read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if re.match(r"( {4}|)lit-prune [a-z]+ +--", line)]
    found = [shlex.split(line, comments=True)[1:] for line in lines]
    return [[STANDING.get(argument, argument) for argument in arguments] for arguments in found]


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[page].read_text(), re.S)


class Parsed(LitPruneCLI):
    """Reads the command line, and does nothing."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def after_instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with the configurations, and text."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for name, line in {"train.txt": "Return the number of items.\n", "val.txt": "Close the file again.\n"}.items():
        Path(name).write_text("".join(f"{number}: {line}" for number in range(900)))
    for copy, original in {"valid.txt": "train.txt", "wiki.test.raw": "val.txt"}.items():
        shutil.copy(original, copy)
    warnings.simplefilter("ignore")
    return tmp_path


def test_there_are_commands_to_check() -> None:
    assert len(commands("README")) >= 5
    assert len([command for page in PAGES for command in commands(page)]) >= 20


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_understood(page: str, project: Path) -> None:
    for number, arguments in enumerate(commands(page)):
        at = [argument for argument in arguments if argument.startswith("runs/") and argument.endswith("config.yaml")]
        for config in at:
            Path(config).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy("configs/quickstart.yaml", config)
        assert Parsed(arguments).subcommand == arguments[0], (number, arguments)


def output(command: list[str]) -> str:
    """The folder that a command writes to, by its option or by its configuration."""
    given = dict(zip(command, [*command[1:], ""], strict=True))
    config = ROOT / given["--config"] if "--config" in given else None
    settings = yaml.safe_load(config.read_text()) if config is not None and config.exists() else {}
    return given.get("--output", settings.get("output", DEFAULT_OUTPUT))


def test_every_command_writes_to_a_folder_of_its_own() -> None:
    """A second command for the same folder would be refused; the same command may stand on several pages."""
    writers: dict[str, set[str]] = {}
    for command in {" ".join(command): command for page in PAGES for command in commands(page)}.values():
        if command[0] in ("validate", "test") or "--overwrite" in command:
            continue
        if command[0] == "fit" and "--ckpt_path" in command:  # continues the run in its folder
            continue
        writers.setdefault(output(command), set()).add(" ".join(command))
    assert len(writers) > 30
    assert {folder: found for folder, found in writers.items() if len(found) > 1} == {}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) and page not in OWN])
def test_commands_run_one_after_the_other(page: str, project: Path) -> None:
    for arguments in commands(page):
        if any(argument.startswith(ELSEWHERE) for argument in arguments):
            continue
        main([*arguments, *_quick(arguments)])


def _quick(arguments: list[str]) -> list[str]:
    """Options that make a command short; they may be repeated, since the commands of a page build on each other."""
    if arguments[0] == "export":
        return ["--overwrite"]
    if arguments[0] in ("validate", "test"):
        return QUICK[:3]
    local = ["--model.pretrained=embedded", "--data.train_files=train.txt", "--data.val_files=val.txt"]
    hub = "smollm2" in str(arguments)
    resumed = "--ckpt_path" in arguments
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"] if arguments[0] == "fit" else []
    steps = ["--pruning.at_step=1"] if "--pruning.at_step" in arguments else []
    gradual = ["--pruning.at_step=[0,1]"] if "gradual" in str(arguments) else []
    return [*(local if hub else []), *QUICK, *short, *steps, *gradual, *([] if resumed else ["--overwrite"])]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CONTRIBUTING" and snippets(page)])
def test_snippets_run(page: str, project: Path) -> None:
    ids = torch.randint(1, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    loader: Any = DataLoader([{"input_ids": row} for row in ids], batch_size=2)
    for snippet in snippets(page):
        if "from_pretrained" in snippet:
            continue  # opens what a command of the page wrote
        space = {
            "model": small_model(),
            "batches_of_token_ids": list(ids.split(2)),
            "module": Foreign(),
            "train_loader": loader,
            "val_loader": loader,
        }
        exec(snippet.replace("FOLDER", STANDING["FOLDER"]), space)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page].read_text()):
        if link.startswith(("https:", "http:")):
            continue
        name, _, anchor = link.partition("#")
        target = PAGES[page].parent / name if name else PAGES[page]
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_no_number_is_left_to_be_filled_in(page: str) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`|^    .*$", "", PAGES[page].read_text(), flags=re.S | re.M)
    assert re.findall(r"\b[A-Z]{2,}_[A-Z0-9_]+\b|\bTODO\b|\bTBD\b", prose) == []
