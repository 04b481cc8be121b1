"""A pretended GPU computes what the CPU computes; a tensor left on the wrong device would be an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK = (
    "mixture",
    "perplexity",
    "Wanda(pattern=Unstructured(), propagate='dense'), llama",
    "Slicing(multiple=8, slice_head=False), llama, blocks",
    "Wanda(pattern=Unstructured(), propagate='dense'), on disk",
    "trial of Wanda",
    "MaskedLoRA, torch.float32, moved after",
    "SparseDelta(), moved after",
)


def errors(*names: str) -> dict[str, str | None]:
    line = [sys.executable, "-m", "tests.pretended", *names]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_a_device_computes_is_what_the_cpu_computes() -> None:
    found = errors(*QUICK)
    assert len(found) >= len(QUICK)
    assert {name: error for name, error in found.items() if error} == {}


@pytest.mark.slow
def test_everything_that_a_device_can_compute() -> None:
    found = errors()
    assert len(found) > 60
    assert {name: error for name, error in found.items() if error} == {}
