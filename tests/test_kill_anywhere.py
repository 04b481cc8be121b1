"""Killed by SIGKILL at random moments, again and again: nothing is half-written, and what goes on ends the same.

One folder is a chain: a run is killed, the next goes on from what that left and is killed too, and so on; the last is
left alone, and ends bit for bit with what a run leaves that nobody killed. The processes are forked from one that has
imported everything, so that a kill costs little. LIT_PRUNE_SEED draws other moments.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml

from tests.test_kill import CASES, STEPS, command, left, write_data

SEED = int(os.environ.get("LIT_PRUNE_SEED", "0"))
PHASES = ("cut", "checkpoint", "export")
CHAINS = {
    **{name: CASES[name] for name in ("masks, gradual, MaskedLoRA", "slices")},
    "masks, LoRA, all weights": [*CASES["masks, LoRA with dropout"], "--pruning.full_checkpoint=true"],
}
KILLS = 9  # a chain
CUT, EXPORT = "Step 4: cutting", "Perplexity, recovered"


@pytest.fixture(scope="module")
def context() -> Iterator[ForkServerContext]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        found = multiprocessing.get_context("forkserver")
        found.set_forkserver_preload(["lit_prune.cli"])
        yield found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    return tmp_path


def work(args: list[str], log: str) -> None:
    """The command, in a process of its own that writes what it says to a file."""
    from lit_prune.cli.main import main

    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    torch.set_num_threads(1)
    main(args)


class Run:
    """A command that is going on.

    Args:
        context: Where its process comes from.
        args: The verb and what follows.
        folder: What it writes to.
    """

    def __init__(self, context: ForkServerContext, args: list[str], folder: Path) -> None:
        self.stale = set(partial(folder / "checkpoints"))  # of the one that was killed before
        self.log = Path(f"{len(list(Path().glob('*.log')))}.log").absolute()
        self.process: BaseProcess = context.Process(target=work, args=(args, str(self.log)))
        self.process.start()

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def end(self) -> None:
        """Waits for it to end well."""
        self.process.join()
        assert self.process.exitcode == 0, self.said[-2000:]

    def kill(self) -> bool:
        """Kills it; returns whether it was still going on."""
        self.process.kill()
        self.process.join()
        assert self.process.exitcode in (-signal.SIGKILL, 0), self.said[-2000:]
        return self.process.exitcode != 0


def wait_for(phase: str, run: Run, folder: Path, step: int) -> None:
    """Waits until a phase has begun: the cut, the writing of a checkpoint once ``step`` is there, or the export."""
    if phase == "checkpoint":
        checkpoints = folder / "checkpoints"
        wait(run, lambda: step_of(checkpoints / "last.ckpt") >= step)
        wait(run, lambda: not set(partial(checkpoints)) <= run.stale)
    else:
        wait(run, lambda: (CUT if phase == "cut" else EXPORT) in run.said)


def wait(run: Run, begun: Callable[[], bool]) -> None:
    while run.process.is_alive() and not begun():
        time.sleep(0.0002)


def partial(folder: Path) -> list[Path]:
    """The file that is being written in a folder, or was when the run was killed."""
    return list(folder.glob(".*.partial-*"))


def step_of(checkpoint: Path) -> int:
    if not checkpoint.exists():
        return -1
    return int(torch.load(checkpoint, weights_only=True)["global_step"])  # mmap opens the path twice


def kill_within(phase: str, run: Run, folder: Path, step: int, seconds: float) -> bool:
    """Kills a run so many seconds after a phase began; returns whether it was still going on."""
    wait_for(phase, run, folder, step)
    time.sleep(seconds)
    return run.kill()


def assert_whole(folder: Path, model: dict[str, bytes]) -> None:
    """Whatever has its name is whole: a checkpoint loads, a model is the one that a run leaves, numbers are JSON."""
    for path in folder.rglob("*.ckpt"):
        if ".partial-" not in str(path):
            assert torch.load(path, weights_only=True)["state_dict"]
    if (folder / "model").exists():
        assert {path.name: path.read_bytes() for path in (folder / "model").glob("*.safetensors")} == model
        assert json.loads((folder / "model" / "config.json").read_text())["lit_prune"]
        assert (folder / "model" / "README.md").read_text().strip()
    if (folder / "report.json").exists():
        assert json.loads((folder / "report.json").read_text())["export"]["verified"]
    if (folder / "config.yaml").exists():
        assert yaml.safe_load((folder / "config.yaml").read_text())["pruning"]


def lengths(context: ForkServerContext, args: list[str], folder: Path) -> dict[str, float]:
    """The seconds of each phase of an uninterrupted run; the mean for checkpoints."""
    run, times, writing, polls = Run(context, args, folder), dict[str, float](), 0.0, time.monotonic()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    while run.process.is_alive():
        now, before = time.monotonic(), polls
        polls = now
        writing += now - before if partial(checkpoint.parent) else 0
        said = run.said
        for name, begun in (("cut", CUT in said), ("after", step_of(checkpoint) > 4), ("export", EXPORT in said)):
            times.setdefault(name, now) if begun else None
        time.sleep(0.001)
    run.end()
    return {
        "cut": times["after"] - times["cut"],
        "checkpoint": writing / STEPS,
        "export": time.monotonic() - times["export"],
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("case", CHAINS)
def test_a_run_that_is_killed_again_and_again(case: str, context: ForkServerContext) -> None:
    draw, folder, args = random.Random(f"{SEED} {case}"), Path("chain"), CHAINS[case]
    seconds = lengths(context, command("whole", *args)[3:], Path("whole"))
    whole, killed, checkpoint = left("whole"), list[str](), folder / "checkpoints" / "last.ckpt"
    for attempt in range(4 * KILLS):
        if len(killed) == KILLS:
            break
        phase = PHASES[len(killed) * len(PHASES) // KILLS]
        if step_of(checkpoint) > {"cut": 4, "checkpoint": STEPS - 4, "export": STEPS}[phase]:
            folder.rename(f"chain-{attempt}")  # past that: begin again
        resumed = ["--ckpt_path=last"] if checkpoint.exists() else ["--overwrite"]
        run = Run(context, command(str(folder), *resumed, *args)[3:], folder)
        step = max(step_of(checkpoint), 0) + draw.randrange(3)
        if kill_within(phase, run, folder, step, draw.uniform(0, seconds[phase])):
            cut_off = [re.sub(r"-\w+$", "", path.name) for path in folder.rglob(".*.partial-*")]
            killed.append(f"{phase}, step {step_of(checkpoint)}, cut off: {cut_off}")
            print(f"{case}: {killed[-1]}")
        assert_whole(folder, whole["model"])
    assert len(killed) == KILLS, killed
    Run(context, command(str(folder), "--ckpt_path=last", *args)[3:], folder).end()
    assert_same(left(str(folder)), whole)
    assert list(folder.rglob(".*.partial-*")) == []


def assert_same(found: dict, whole: dict) -> None:
    assert found["cuts"] == whole["cuts"]
    assert found["model"] == whole["model"]
    assert found["tensors"].keys() == whole["tensors"].keys()
    assert all(torch.equal(found["tensors"][name], tensor) for name, tensor in whole["tensors"].items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_export_over_an_older_one_that_is_killed(context: ForkServerContext) -> None:
    """The folder has one whole model at any moment: the older one, or the new."""
    draw, folder = random.Random(f"{SEED} export"), Path("run")
    Run(context, command("run", *CHAINS["slices"])[3:], folder).end()
    again = ["export", "--output=run", "--ckpt_path=last", "--overwrite"]
    run = Run(context, again, folder)
    wait_for("export", run, folder, 0)
    begin = time.monotonic()
    run.end()
    seconds, weights, killed = time.monotonic() - begin, left("run")["model"], 0
    for _ in range(4 * KILLS):
        if killed == KILLS:
            break
        (folder / "model" / "older").touch()
        killed += kill_within("export", Run(context, again, folder), folder, 0, draw.uniform(0, seconds))
        print(f"export over an older one: {[path.name for path in partial(folder)]}")
        assert (folder / "model").is_dir()
        assert_whole(folder, weights)
    assert killed == KILLS
    Run(context, again, folder).end()
    assert list(folder.rglob(".*.partial-*")) == []
    assert not (folder / "model" / "older").exists()
