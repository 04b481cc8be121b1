"""Bytes, loading time and peak memory of packed folders, against the ordinary folders of the same models.

    MALLOC_MMAP_THRESHOLD_=1000000 python benchmarks/packed.py --pretrained FOLDER

The model is pruned by Magnitude in bfloat16 and written in both formats. Each folder is opened in processes of its own,
in turn with the other. The least time counts, seconds of CPU with the files in the system's cache, until every weight
has been read: transformers maps the files of an ordinary folder without reading them. Anonymous memory is RssAnon in
/proc (Linux), without the pages of mapped files, which the system drops when it needs memory. An interrupted run
continues from the file of results.
"""

from __future__ import annotations

import multiprocessing
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
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
    """Returns the least seconds and the greatest peaks of memory of ``times`` processes for each folder."""
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in FORMATS}
    for _ in range(times):
        for name in FORMATS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                costs[name].append(pool.apply(open_here, [str(work / name)]))
    extreme = {"seconds": min, "cpu_seconds": min, "anonymous": max, "resident": max}
    return {
        name: {key: of(cost[key] for cost in measured) for key, of in extreme.items()}
        for name, measured in costs.items()
    }


def open_here(folder: str) -> dict[str, float]:
    """Returns the cost of opening a folder and reading its weights: seconds, seconds of CPU, and peaks of memory."""
    start, peak, done = _memory(), [0, 0], threading.Event()

    def look() -> None:
        peak[:] = [max(pair) for pair in zip(peak, _memory(), strict=True)]

    def watch() -> None:
        while not done.wait(0.002):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.view(torch.int16).max()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    done.set()
    watcher.join()
    look()
    anonymous, resident = (most - before for most, before in zip(peak, start, strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu, "anonymous": anonymous, "resident": resident}


def _memory() -> list[int]:
    """Returns the anonymous and the whole resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return [fields["RssAnon"], sum(fields.values())]


def measure(pretrained: str, recipe: Recipe, work: Path, times: int) -> Row:
    """Returns the row of one sparsity; its folders are deleted."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        write(pretrained, recipe, work)
        folders = {name: sum(file.stat().st_size for file in (work / name).glob("*.safetensors")) for name in FORMATS}
        return {"linears": linear_bytes(work), "folders": folders, "open": open_in_processes(work, times)}
    finally:
        shutil.rmtree(work)


def main(
    pretrained: str = "embedded", work: str = "runs/packed", results: str = "runs/packed.jsonl", times: int = 5
) -> None:
    """Measures and prints the table.

    Args:
        pretrained: The dense model.
        work: Folder for the pruned models; it is deleted.
        results: Results file, one JSON object per line.
        times: Number of processes that open each folder.
    """
    rows = [
        Results(results).once(name, lambda recipe=recipe: measure(pretrained, recipe, Path(work), times))  # type: ignore[misc]
        for name, recipe in PATTERNS.items()
    ]
    print(cost_table(rows))


def cost_table(rows: Sequence[Row]) -> str:
    """Returns the table of bytes, loading time and peak memory of packed folders, against the ordinary ones."""
    lines = []
    for row in rows:
        linears, folders, opened = row["linears"], row["folders"], row["open"]
        shares = [f"{sizes['packed'] / sizes['ordinary']:.1%}" for sizes in (linears, folders)]
        seconds = [f"{opened[name]['cpu_seconds']:.2f}" for name in FORMATS]
        above = opened["packed"]["anonymous"] - linears["ordinary"]
        lines.append([row["case"], *shares, *seconds, f"{above / 1e6:.1f}", f"{linears['largest'] / 1e6:.1f}"])
    head = ["sparsity", "bytes of the linears", "of the folder", "s, ordinary", "s, packed"]
    return table([*head, "MB beside the unpacked linears", "MB of the largest"], lines)


if __name__ == "__main__":
    auto_cli(main)
