"""Bytes, loading time and peak memory of packed folders, against the ordinary folders of the same models.

    OMP_NUM_THREADS=1 python benchmarks/packed.py --pretrained FOLDER

The model is pruned by Magnitude in bfloat16 and written in both formats. The folders are opened by turns, each time in
a process of its own, with the files in the system's cache. Medians of seconds of CPU are reported:

- of opening a folder until every weight has been read, in processes that have imported everything before. transformers
  maps the files of an ordinary folder into memory; it is opened a second time with its bytes read (`disable_mmap`).
- of a whole program, which imports lit_prune and transformers, opens a folder and runs the model on 8 tokens.

Peaks of memory are those of RssAnon in /proc (Linux), which does not count mapped files, since the system drops their
pages when it needs memory. An interrupted run continues from the file of results.
"""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from resumable import Results, Row
from safetensors import safe_open
from tables import table
from transformers import AutoModelForCausalLM

from lit_prune.allocate import Uniform
from lit_prune.export.formats import ExportFormat, HuggingFace, Packed
from lit_prune.export.plan import ExportPlan
from lit_prune.models.load import load_model
from lit_prune.packed.unpack import BITS, LAYOUT
from lit_prune.pipeline import prune
from lit_prune.pruning import Magnitude, NofM
from lit_prune.recipe import Recipe

PATTERNS: dict[str, Recipe] = {
    "0.5": Recipe(Magnitude(), 0.5),
    "0.6": Recipe(Magnitude(), 0.6),
    "0.7": Recipe(Magnitude(), 0.7),
    "2:4": Recipe(Magnitude(NofM(2, 4)), 0.5, Uniform()),
}
FORMATS: dict[str, ExportFormat] = {"ordinary": HuggingFace(), "packed": Packed()}
WAYS = {"mapped": ("ordinary", False), "read": ("ordinary", True), "packed": ("packed", False)}  # format, disable_mmap
PROGRAM = """
import sys, torch, lit_prune
from transformers import AutoModelForCausalLM

AutoModelForCausalLM.from_pretrained(sys.argv[1])(torch.arange(8)[None])
"""


def write(pretrained: str, recipe: Recipe, work: Path) -> None:
    """Writes the pruned model in both formats."""
    model = load_model(pretrained, "bfloat16")
    prune(model, [torch.arange(64)[None]], recipe)
    plan = ExportPlan.of(model)
    for name, format in FORMATS.items():
        format.write(plan, work / name)


def linear_bytes(work: Path) -> dict[str, int]:
    """Returns the bytes of the packed weights in both folders, and the largest of them in the ordinary one."""
    sizes = {name: _sizes(work / name) for name in FORMATS}
    packed = [name.removesuffix(BITS) for name in sizes["packed"] if name.endswith(BITS)]
    return {
        "ordinary": sum(sizes["ordinary"][name] for name in packed),
        "packed": sum(sizes["packed"][name + end] for name in packed for end in ("", BITS, LAYOUT)),
        "largest": max(sizes["ordinary"][name] for name in packed),
    }


def _sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            sizes |= {name: stored.get_tensor(name).nbytes for name in stored.keys()}  # noqa: SIM118 (no mapping)
    return sizes


def open_in_processes(work: Path, times: int) -> dict[str, Any]:
    """Returns the median seconds of CPU and peak of memory for each way of opening a folder."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["__main__", "lit_prune.models.remote_code.modeling_shrunk"])
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(times):
        for way, (name, read) in WAYS.items():
            for costs, of in ((seconds, seconds_here), (peaks, peak_here)):
                with server.Pool(1) as pool:
                    costs[way].append(pool.apply(of, [str(work / name), read]))
    return {way: {"seconds": median(seconds[way]), "peak": median(peaks[way])} for way in WAYS}


def seconds_here(folder: str, read: bool) -> float:
    """Returns the seconds of CPU that a folder is opened in, until every weight has been read."""
    begin = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder, disable_mmap=read)
    for parameter in model.parameters():
        parameter.view(torch.int16).max()
    return time.process_time() - begin


def peak_here(folder: str, read: bool) -> int:
    """Returns the bytes of anonymous memory that opening a folder takes at most."""
    before, peak, done = _memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModelForCausalLM.from_pretrained(folder, disable_mmap=read)
    done.set()
    watcher.join()
    peak = max(peak, _memory())
    del model
    return peak - before


def _memory() -> int:
    """Returns the anonymous memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def run_programs(work: Path, times: int) -> dict[str, float]:
    """Returns the median seconds of CPU of a program that opens a folder and runs the model, for each format."""
    seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(times):
        for name in FORMATS:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", PROGRAM, str(work / name)], check=True, stderr=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {name: median(measured) for name, measured in seconds.items()}


def measure(pretrained: str, recipe: Recipe, work: Path, times: int) -> Row:
    """Returns the row of one sparsity; its folders are deleted."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        write(pretrained, recipe, work)
        folders = {name: sum(file.stat().st_size for file in (work / name).glob("*.safetensors")) for name in FORMATS}
        costs = {"open": open_in_processes(work, times), "program": run_programs(work, times)}
        return {"linears": linear_bytes(work), "folders": folders, **costs}
    finally:
        shutil.rmtree(work)


def main(
    pretrained: str = "embedded",
    sparsities: Sequence[str] = tuple(PATTERNS),
    work: str = "runs/packed",
    results: str = "runs/packed.jsonl",
    times: int = 5,
) -> None:
    """Measures and prints the tables.

    Args:
        pretrained: The dense model.
        sparsities: Rows of the tables: sparsities and patterns.
        work: Folder for the pruned models; it is deleted.
        results: Results file, one JSON object per line.
        times: Number of processes that open each folder.
    """
    rows = [
        Results(results).once(name, lambda recipe=recipe: measure(pretrained, recipe, Path(work), times))  # type: ignore[misc]
        for name, recipe in PATTERNS.items()
        if name in sparsities
    ]
    print(cost_tables(rows))


def cost_tables(rows: Sequence[Row]) -> str:
    """Returns the tables of bytes, and of seconds and memory, of packed folders against the ordinary ones."""
    sizes, costs = [], []
    for row in rows:
        linears, folders, opened, program = row["linears"], row["folders"], row["open"], row["program"]
        shares = [f"{bytes['packed'] / bytes['ordinary']:.1%}" for bytes in (linears, folders)]
        sizes.append([row["case"], *shares])
        seconds = [f"{opened[way]['seconds']:.2f}" for way in WAYS] + [f"{program[name]:.2f}" for name in FORMATS]
        above = opened["packed"]["peak"] - linears["ordinary"]
        memory = [f"{size / 1e6:.1f}" for size in (above, opened["mapped"]["peak"], linears["largest"])]
        costs.append([row["case"], *seconds, *memory])
    opening = ["s to open, mapped", "read", "packed", "s of a program, ordinary", "packed"]
    memory = ["MB beside the unpacked linears", "beside a mapped file", "of the largest linear"]
    bytes_table = table(["sparsity", "bytes of the linears", "of the folder"], sizes)
    return f"{bytes_table}\n\n{table(['sparsity', *opening, *memory], costs)}"


if __name__ == "__main__":
    auto_cli(main)
