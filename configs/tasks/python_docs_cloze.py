"""The questions of python_docs_cloze.yaml: the last word of a line of documentation, among three from other lines."""

from __future__ import annotations

import random
import re
from typing import Any

from datasets import Dataset, DatasetDict

from lit_prune.data.python_docs import python_docs

LINE = re.compile(r"[A-Z][\w ,'()-]{30,110} ([a-z]{4,})\.")
QUESTIONS = 500


def load(**_settings: Any) -> DatasetDict:
    """Returns the questions as the split `test`, with columns `context`, `choices` and `label`; always the same."""
    text = "\n".join(document["text"] for document in python_docs("validation"))
    lines = {match.group(0): match.group(1) for line in text.splitlines() if (match := LINE.fullmatch(line.strip()))}
    words, order = sorted(set(lines.values())), random.Random(0)
    rows = []
    for line in order.sample(sorted(lines), min(QUESTIONS, len(lines))):
        others = order.sample([word for word in words if word != lines[line]], 3)
        label = order.randrange(4)
        choices = [*others[:label], lines[line], *others[label:]]
        rows.append({"context": line.removesuffix(f" {lines[line]}."), "choices": choices, "label": label})
    return DatasetDict({"test": Dataset.from_list(rows)})
