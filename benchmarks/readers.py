"""Perplexity of exported folders as other versions of transformers open them.

    python -m venv old && old/bin/pip install torch peft 'transformers==4.57.6'
    python benchmarks/readers.py runs/quickstart/model runs/quickstart_lora/model --python old/bin/python

Every folder is opened in a process of its own, by the interpreter that runs this script and by the given ones, with
``AutoTokenizer`` and ``AutoModelForCausalLM`` alone, without lit_prune. All must find the same number of tokens and the
same perplexity, or the script ends with an error.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

WINDOW_TOKENS, TOLERANCE = 128, 1e-4
READ = f"""
import json, sys, torch, transformers
sys.modules["lit_prune"] = None
folder, text = sys.argv[1], sys.stdin.read()
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
ids = tokenizer(text, return_tensors="pt").input_ids[0]
windows = ids[: len(ids) // {WINDOW_TOKENS} * {WINDOW_TOKENS}].view(-1, {WINDOW_TOKENS})
with torch.no_grad():
    losses = [float(model(row[None], labels=row[None], use_cache=False).loss) for row in windows]
loss = sum(losses) / len(losses)
print(json.dumps({{"transformers": transformers.__version__, "tokens": len(ids), "loss": loss}}))
"""


def read(python: str, folder: Path, text: str) -> dict[str, Any]:
    """Returns the version of transformers of ``python``, the number of tokens of ``text``, and their mean loss."""
    command = [python, "-c", READ, str(folder)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} cannot open {folder}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints a line for every folder and interpreter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="Exported model folders, with their tokenizers.")
    parser.add_argument("--python", action="append", default=[], help="Another interpreter; may be repeated.")
    parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "LICENSE", help="A text file.")
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")
    for folder in given.folders:
        found = [read(python, folder, text) for python in (sys.executable, *given.python)]
        for one in found:
            print(f"{folder}  transformers {one['transformers']}  perplexity {math.exp(one['loss']):.4f}", flush=True)
            if one["tokens"] != found[0]["tokens"] or abs(one["loss"] - found[0]["loss"]) > TOLERANCE:
                sys.exit(f"{folder}: transformers {one['transformers']} reads another model or other tokens.")


if __name__ == "__main__":
    main()
