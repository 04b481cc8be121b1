"""The command, see the package."""

from __future__ import annotations

import multiprocessing
import re
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from benchmarks import gpu, tables
from benchmarks.gpu import fits, pruning
from benchmarks.gpu.case import Case, Row, Settings, run_case
from benchmarks.resumable import Results

Run = Callable[[Case, Settings, torch.device], Row]


def cases(only: str = "") -> list[Case]:
    """Returns the cases whose names contain ``only``."""
    return [case for case in (*pruning.cases(), *fits.cases()) if only in case.name]


def alone(case: Case, settings: Settings, device: torch.device) -> Row:
    """Returns the row of ``case``, run in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_case, case, settings, device).result()


def check(case: Case, settings: Settings, device: torch.device, results: Results, run: Run = alone) -> Row:
    """Returns the row of ``case``: what it measured, the perplexity on the CPU, and the error if there is one."""
    try:
        expected = _expected(case, settings, results, run)
        row = expected | run(case, settings, device)
        found, known = row.get("perplexity"), row.get("expected")
        if found is not None and known is not None and not abs(found / known - 1) <= case.tolerance:
            row["error"] = f"perplexity is {found / known - 1:+.2%} of the CPU's, allowed are {case.tolerance:.2%}"
    except Exception as error:
        traceback.print_exc()
        row = {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    about = {"device": device_name(device), "torch": torch.__version__, "settings": asdict(settings)}
    return about | {"tolerance": case.tolerance, **row}


def _expected(case: Case, settings: Settings, results: Results, run: Run) -> Row:
    reference = case.reference
    if reference is None:
        return {}
    row = results.once(f"{reference.name}, on the CPU", partial(run, reference, settings, torch.device("cpu")))
    return {"expected": row["perplexity"]}


def device_name(device: torch.device) -> str:
    """Returns the name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def results_file(device: torch.device) -> Path:
    """Returns the file of a device's results."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return tables.MEASURED / f"gpu-{slug}.jsonl"


def main(arguments: list[str] | None = None) -> int:
    """Runs the missing cases, prints their table, and returns 1 if one failed, else 0."""
    parser = ArgumentParser(description=gpu.__doc__)
    parser.add_class_arguments(Settings, as_group=False)
    parser.add_argument("--device", default="cuda", help="Device that is compared with the CPU.")
    parser.add_argument("--only", default="", help="Run only the cases whose name contains this text.")
    parser.add_argument("--results", type=Path | None, default=None, help="Results file; null is that of the device.")
    parser.add_argument("--table", action="store_true", help="Only write the table of docs/devices.md.")
    options: Any = parser.parse_args(arguments)
    if options.table:
        tables.main()
        return 0
    settings = Settings(**{name: options[name] for name in asdict(Settings())})
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("`device` must be one that this machine has, got cuda: PyTorch finds no GPU.", file=sys.stderr)
        return 2
    results = Results(str(options.results or results_file(device)))
    if any(row.get("settings", asdict(settings)) != asdict(settings) for row in results.rows):
        print(f"{results.path} has results of other settings: give another file by --results.", file=sys.stderr)
        return 2
    results.remove(lambda row: "error" in row)
    chosen = cases(options.only)
    rows = [results.once(case.name, partial(check, case, settings, device, results)) for case in chosen]
    print(tables.gpu(rows))
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"FAILED {row['case']}: {row['error']}", file=sys.stderr)
    print(f"{len(rows) - len(failed)} of {len(rows)} cases are right, {results.path}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
