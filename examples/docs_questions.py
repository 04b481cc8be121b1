"""Makes a small set of conversations about the functions of Python's standard library, without downloads.

    python examples/docs_questions.py talks

Writes talks/train.jsonl and talks/val.jsonl with rows of `prompt` and `completion`, from the docstrings of the running
Python. The validation questions are about other modules than the training questions.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from lit_prune.data.python_docs import python_docs

FUNCTION = re.compile(r"^def (\w+\(.{0,80}\))\n([A-Z].{15,150}?\.)$", re.MULTILINE)


def questions(text: str) -> list[dict[str, str]]:
    """Returns a row for every function in ``text`` whose docstring begins with a sentence on a line of its own."""
    return [
        {"prompt": f"What does {signature} do?", "completion": sentence}
        for signature, sentence in FUNCTION.findall(text)
    ]


def main(folder: str) -> None:
    """Writes the two files into ``folder``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part, name in (("train", "train"), ("validation", "val")):
        rows = [row for document in python_docs(part) for row in questions(document["text"])]  # type: ignore[arg-type]
        target = Path(folder) / f"{name}.jsonl"
        target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{target}: {len(rows)} conversations")


if __name__ == "__main__":
    main(sys.argv[1])
