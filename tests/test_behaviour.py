"""The output of small runs of the command, compared with earlier output: the files of tests/behaviour/.

A golden file tells of one run: the values of report.json, config.yaml and plan.yaml, the names and types in the
checkpoint, and the exported folder. What a clock measures, and versions, are there by name and type alone. A change
that is meant is written into them, from the repository's root, and reviewed as a diff:

    OMP_NUM_THREADS=1 python -m tests.test_behaviour            # or with the names of runs behind it
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import warnings
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from lit_prune.cli.main import main

GOLDEN = Path(__file__).parent / "behaviour"
BY_TYPE = re.compile(r"seconds|speed|^versions$|_version$|^max_logit_difference$")  # names of what differs every time
TOLERANCE = 1e-2  # of a float, relative: kernels differ from processor to processor, by 0.4% behind pruned blocks
BLOCK = re.compile(r"\blayers\.(\d+)\.")
THREADS = re.compile(r"CPU, \d+ threads?")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(\.\d+)*(e-?\d+)?\b")

SMALL = [
    *("--model.dtype=float32", "--trainer.accelerator=cpu", "--data.train_files=train.txt", "--data.val_files=val.txt"),
    *("--data.seq_length=64", "--data.batch_size=4", "--data.val_windows=8"),
    *("--pruning.calibration.num_samples=16", "--pruning.calibration.seq_length=64"),
]
FIT = ["fit", "--model.lr=1e-3", "--trainer.max_steps=4", "--trainer.enable_progress_bar=false"]
RUNS = {
    "lora": [*FIT, "--pruning.method=Wanda", "--pruning.allocation=DLP", "--pruning.recovery=LoRA"],
    "gradual": [
        *(*FIT, "--pruning.method=Wanda", "--pruning.method.propagate=pruned", "--pruning.recovery=MaskedLoRA"),
        *("--pruning.sparsity=0.6", "--pruning.at_step=[0, 2]", "--pruning.schedule=Cubic"),
    ],
    "sliced": [
        *(*FIT, "--pruning.method=Slicing", "--pruning.sparsity=0.3", "--pruning.recovery=LoRA"),
        *("--pruning.allocation=LayerRedundancy", "--pruning.allocation.base=0.2"),
    ],
    "shrunk": [
        *(*FIT, "--pruning.method=MLPWidth", "--pruning.sparsity=0.3", "--pruning.recovery=LoRA"),
        *("--pruning.allocation=LayerRedundancy", "--pruning.method.multiple=32"),
    ],
    "two_of_four": [  # behind pruned blocks, as is its default, SparseGPT multiplies the differences of kernels
        *("prune", "--pruning.method=SparseGPT", "--pruning.method.propagate=dense", "--pruning.allocation=Uniform"),
        *("--pruning.method.pattern=NofM", "--pruning.method.pattern.n=2", "--pruning.method.pattern.m=4"),
    ],
    "score": ["score", "--pruning.method=SparseGPT", "--pruning.allocation=OWL"],
    "qlora": [*FIT, "--pruning.recovery=QLoRA"],
    "finetuned": [*FIT, "--model.pretrained=two_of_four/model", "--pruning.method=null"],
}


def run(name: str) -> None:
    """Writes the folder of a run, and of the run before it, into the working directory; once."""
    if Path(name).exists():
        return
    if name == "finetuned":
        run("two_of_four")
    text = (GOLDEN.parent.parent / "LICENSE").read_text()  # which stays as it is
    Path("train.txt").write_text(text[3000:])
    Path("val.txt").write_text(text[:3000])
    main([*RUNS[name], *SMALL, f"--output={name}"])


def recorded(folder: Path) -> dict[str, Any]:
    """Returns what is pinned of a run's folder, as it is read from a golden file."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {"files": list(files)} | {name: content(path) for name, path in files.items()}
    return json.loads(json.dumps({name: known for name, known in found.items() if known is not None}))


def content(path: Path) -> Any:
    match path.name, path.suffix:
        case "config.yaml", _:
            settings = yaml.safe_load(path.read_text())
            return rounded({group: value for group, value in settings.items() if group != "trainer"})
        case "plan.yaml", _:
            return {
                "text": NUMBER.sub("#", path.read_text()).splitlines(),
                "rates": rounded(yaml.safe_load(path.read_text())),
            }
        case "adapter_config.json", _:
            return sorted(json.loads(path.read_text()))
        case (("report.json" | "config.json" | "generation_config.json"), _):
            return rounded(json.loads(path.read_text()))
        case "README.md", _:
            return NUMBER.sub("#", THREADS.sub("CPU", path.read_text())).splitlines()
        case "metrics.csv", _:
            return path.read_text().splitlines()[0]
        case _, ".safetensors":
            return tensors(path)
        case _, ".ckpt":
            stored = torch.load(path, map_location="cpu", weights_only=True)
            parts = {name: tree(stored[name]) for name in ("lit_prune", "callbacks")}
            return {"keys": sorted(stored), "state_dict": by_block(stored["state_dict"]), **parts}
    return None


def tensors(path: Path) -> dict[str, Any]:
    """Returns the tensors of a file, and the zeros in each block of what is not packed."""
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = sorted(file.metadata() or {})
    zeros: dict[str, int] = {"all": 0}
    for name, tensor in stored.items():
        if tensor.is_floating_point():
            for key in ("all", block_of(name)):
                zeros[key] = zeros.get(key, 0) + int((tensor == 0).sum())
    return {"tensors": by_block(stored), "zeros": zeros, "metadata": metadata}


def block_of(name: str) -> str:
    found = BLOCK.search(name)
    return found[1] if found else "outside"


def by_block(stored: dict[str, torch.Tensor]) -> dict[str, str]:
    """Returns the blocks that a name, type and shape is in: {"layers.*.down_proj.weight float32 2x3": "0 1"}."""
    lines: dict[str, list[str]] = {}
    for name, tensor in sorted(stored.items()):
        shape = "text" if ".quant_state." in name else "x".join(map(str, tensor.shape))  # numbers as text
        line = f"{BLOCK.sub('layers.*.', name)} {kind(tensor)} {shape}"
        lines.setdefault(line, []).append(block_of(name))
    return {line: " ".join(blocks) for line, blocks in lines.items()}


def kind(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__


def tree(value: Any) -> Any:
    """Returns the names in a value and the types under them, each once."""
    if isinstance(value, dict):
        under: dict[str, list[Any]] = {}
        for name, item in value.items():
            under.setdefault(BLOCK.sub("layers.*.", str(name)), []).append(item)
        return {name: tree(items[0]) if len(items) == 1 else tree(items) for name, items in under.items()}
    if isinstance(value, list):
        kinds = [tree(item) for item in value]
        return [item for index, item in enumerate(kinds) if item not in kinds[:index]]
    return kind(value)


def rounded(value: Any, by_type: bool = False) -> Any:
    """Returns a value with six digits a float, and of what differs every time the type."""
    if isinstance(value, dict):
        return {name: rounded(item, by_type or bool(BY_TYPE.search(str(name)))) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, by_type) for item in value]
    if by_type:
        return f"<{kind(value)}>"
    return float(f"{value:.6g}") if isinstance(value, float) else value


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {below: leaf for key, item in items for below, leaf in flat(item, f"{path}/{key}").items()}


def alike(path: str, was: Any, now: Any) -> bool:
    if type(was) is type(now) is float:
        return math.isclose(was, now, rel_tol=TOLERANCE, abs_tol=5e-6)
    if type(was) is type(now) is int and "/zeros" in path:  # a rate may round to another number, a product to zero
        return math.isclose(was, now, rel_tol=1e-4, abs_tol=16)
    return type(was) is type(now) and was == now


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_what_it_left_before(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    warnings.simplefilter("ignore")
    run(name)
    was, now = flat(json.loads((GOLDEN / f"{name}.json").read_text())), flat(recorded(Path(name)))
    pairs = {path: (was.get(path, "nothing"), now.get(path, "nothing")) for path in was | now}
    changed = [f"{path}: was {pair[0]}, is {pair[1]}" for path, pair in pairs.items() if not alike(path, *pair)]
    assert not changed, "\n".join(changed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for name in sys.argv[1:] or RUNS:
            run(name)
            (GOLDEN / f"{name}.json").write_text(json.dumps(recorded(Path(name)), indent=1) + "\n")
