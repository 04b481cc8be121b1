"""CPU seconds until the command answers, relative to ``import torch``.

    python benchmarks/startup.py

Each line has the user and system seconds of a fresh process, the smallest of three runs, and their ratio to
``import torch``.
"""

from __future__ import annotations

import os
import subprocess
import sys

RUNS = 3
TORCH = [sys.executable, "-c", "import torch"]
COMMAND = [sys.executable, "-m", "lit_prune.cli"]
CASES = {
    "import torch": TORCH,
    "import lit_prune": [sys.executable, "-c", "import lit_prune"],
    "lit-prune --version": [*COMMAND, "--version"],
    "lit-prune --help": [*COMMAND, "--help"],
    "lit-prune prone": [*COMMAND, "prone"],
    "lit-prune fit --pruning.sparsty=0.5": [*COMMAND, "fit", "--pruning.sparsty=0.5"],
    "lit-prune fit --pruning.method=Wnda": [*COMMAND, "fit", "--pruning.method=Wnda"],
    "lit-prune fit --help": [*COMMAND, "fit", "--help"],
}


def cpu_seconds(command: list[str]) -> float:
    """Returns the user and system seconds of ``command``, the smallest of ``RUNS`` runs."""
    seconds = []
    for _ in range(RUNS):
        before = os.times()
        subprocess.run(command, capture_output=True, check=False)
        after = os.times()
        user = after.children_user - before.children_user
        seconds.append(user + after.children_system - before.children_system)
    return min(seconds)


def main() -> None:
    """Prints the table."""
    torch_seconds = cpu_seconds(TORCH)
    print(f"{'':<38} CPU seconds  times import torch")
    for name, command in CASES.items():
        seconds = torch_seconds if command is TORCH else cpu_seconds(command)
        print(f"{name:<38} {seconds:11.2f}  {seconds / torch_seconds:18.2f}")


if __name__ == "__main__":
    main()
