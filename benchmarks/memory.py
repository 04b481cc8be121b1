"""Peak memory and time of pruning a model that stays on disk, against pruning it in memory and the documented limit.

    python benchmarks/memory.py --folder /some/disk            # a random Llama of 1.1 billion parameters, 2.2 GB
    python benchmarks/memory.py --folder /some/disk --layers 44

Every run is `lit-prune prune` in a process of its own: DLP and the method, the perplexity before and after, the export
and its verification. Anonymous memory is RssAnon in /proc (Linux), sampled every few milliseconds. By default glibc
keeps freed memory for later, so the processes run with MALLOC_MMAP_THRESHOLD_=1000000; `--malloc default` does not set
it. The constant part of the limit is the memory of the same command for the embedded model, which is tiny, also on
disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_prune.models.load import EMBEDDED, load_config

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
MB = 1e6


@dataclass
class Run:
    """The cost of one command.

    Attributes:
        peak_bytes: Peak of anonymous memory.
        seconds: Duration of the whole process.
        stopped: Whether the process was killed because it exceeded the allowed memory.
    """

    peak_bytes: int
    seconds: float
    stopped: bool


def random_llama(folder: Path, layers: int = 22, width: int = 2048, inner: int = 5632, vocabulary: int = 32000) -> Path:
    """Writes a Llama with random bfloat16 weights, layer by layer, and the embedded tokenizer; returns its folder.

    The defaults are TinyLlama's shape: 1.1 billion parameters.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 512, 1),
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / file, folder / file)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    weight_map, random = {}, torch.Generator().manual_seed(0)
    for part in dict.fromkeys(map(_part, shapes)):
        names = [name for name in shapes if _part(name) == part]
        save_file(
            {name: _random(shapes[name], random) for name in names}, folder / f"{part}.safetensors", {"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, f"{part}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _part(name: str) -> str:
    """Returns the name of the file for a weight: one file per layer, and one for the rest."""
    return f"layer-{name.split('.')[2]}" if ".layers." in name else "rest"


def _random(shape: torch.Size, random: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)


def limit_bytes(pretrained: str, method: str, tokens: int) -> int:
    """Returns the limit of ``models.on_disk`` without its constant, for a Llama in bfloat16 whose MLP is widest.

    The limit is max(4 W, B + work) + 2 * tokens * hidden size, where W is the number of weights in a block and B = 2 W
    their bytes. A block of TinyLlama has 44 million weights, 23 million of them in gate and up; the limit for Wanda is
    88 + 46 + 185 MB plus the activations.

    Args:
        pretrained: The model.
        method: Wanda, Magnitude or SparseGPT.
        tokens: Calibration tokens.
    """
    config = load_config(pretrained)
    width, inner = config.hidden_size, config.intermediate_size
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    block, linear = width * (heads + 3 * inner), width * inner
    work = {
        "Wanda": 2 * 2 * linear + 16 * linear,
        "Magnitude": 2 * 2 * linear + 28 * linear,  # ties in magnitude are resolved through indices
        "SparseGPT": max(12 * 2 * linear + 28 * width**2, 12 * linear + 28 * inner**2),
    }
    return max(4 * block, 2 * block + work[method]) + 2 * tokens * width


def pruned(
    pretrained: str,
    output: Path,
    *,
    on_disk: bool,
    method: str = "Wanda",
    num_samples: int = 4,
    seq_length: int = 64,
    malloc: bool = True,
    at_most: float = float("inf"),
) -> Run:
    """Returns the cost of `lit-prune prune` in a process of its own, which is killed if it exceeds ``at_most`` bytes.

    Raises:
        RuntimeError: if it fails; the message is the output of the command.
    """
    command = [sys.executable, "-m", "lit_prune.cli", "prune", f"--model.pretrained={pretrained}"]
    command += [f"--model.on_disk={str(on_disk).lower()}", f"--output={output}", f"--pruning.method={method}"]
    command += [f"--pruning.calibration.num_samples={num_samples}", f"--pruning.calibration.seq_length={seq_length}"]
    command += [f"--data.seq_length={seq_length}", "--data.val_windows=1", "--trainer.accelerator=cpu"]
    begin, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output_file:
        environment = os.environ | (MALLOC if malloc else {})
        process = subprocess.Popen(command, stdout=output_file, stderr=output_file, env=environment)
        while process.poll() is None and peak <= at_most:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)
        stopped = process.poll() is None
        if stopped:
            process.kill()
        if process.wait() != 0 and not stopped:
            output_file.seek(0)
            raise RuntimeError(output_file.read())
    return Run(peak, time.perf_counter() - begin, stopped)


def anonymous_bytes(pid: int) -> int:
    """Returns the anonymous memory of a process; 0 if the process is exiting."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def main(
    folder: str = ".",
    layers: int = 22,
    method: str = "Wanda",
    num_samples: int = 4,
    seq_length: int = 64,
    malloc: Literal["trimmed", "default"] = "trimmed",
) -> None:
    """Prints the table.

    Args:
        folder: Folder for the random model and the pruned ones, which are deleted; three times the size of the model.
        layers: Number of layers of the random model, 44 million parameters each.
        method: Wanda, Magnitude or SparseGPT.
        num_samples: Calibration windows.
        seq_length: Tokens per window.
        malloc: `trimmed` lowers glibc's thresholds, `default` does not.
    """
    settings = {"method": method, "num_samples": num_samples, "seq_length": seq_length, "malloc": malloc == "trimmed"}
    with tempfile.TemporaryDirectory(dir=folder) as work:
        model, out = str(random_llama(Path(work) / "random", layers)), Path(work)
        weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
        limit = limit_bytes(model, method, num_samples * seq_length)
        constant = pruned("embedded", out / "constant", on_disk=True, **settings)  # type: ignore[arg-type]
        runs = {
            "on disk": pruned(model, out / "on_disk", on_disk=True, **settings),  # type: ignore[arg-type]
            "in memory": pruned(model, out / "in_memory", on_disk=False, **settings),  # type: ignore[arg-type]
        }
    table = Table(title=f"{method}, {num_samples} windows of {seq_length} tokens, weights {weights / MB:,.0f} MB")
    for column in ("", "peak of anonymous memory, MB", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, run in runs.items():
        table.add_row(name, f"{run.peak_bytes / MB:,.0f}", f"{run.seconds:.0f}")
    table.add_row("limit", f"{(constant.peak_bytes + limit) / MB:,.0f}", "")
    table.add_row("of it, constant", f"{constant.peak_bytes / MB:,.0f}", f"{constant.seconds:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    auto_cli(main)
