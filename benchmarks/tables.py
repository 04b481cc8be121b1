"""Writes the tables of the docs from the results in benchmarks/measured/.

    python benchmarks/tables.py

A table of a page stands between `<!-- table: NAME -->` and `<!-- end -->` and is replaced. The other benchmarks print
the same tables when they finish; to update the docs, copy the results file of a benchmark to benchmarks/measured/
under the name of the benchmark. For papers and slices those files have only the fields that the tables show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "benchmarks" / "measured"
BLOCK = re.compile(r"(<!-- table: ([a-z ]+) -->\n).*?(<!-- end -->)", re.S)

ALLOCATIONS = ("Uniform", "OWL", "AlphaPruning", "DLP", "LayerRedundancy")
METHODS = ("Magnitude", "Wanda", "SparseGPT")
METHODS_BY_COST = ("Wanda", "SparseGPT", "ADMM")
PATTERNS = ("2:4", "4:8", "N:8 by OWL", "N:8 by DLP")
MEANS = (0.20, 0.25, 0.30)
SHRINKING = r"not compensated|reconstructed|neighbours|refitted|\d+ windows"  # settings of shrunk models
DENSE_TRAINED = "dense, 100 steps of LoRA"  # a case of shrinking.py
WIDTHS = ("constant", "LayerRedundancy, base 0.05 below", "LayerRedundancy, base 0.10 below", "DLP")
RECOVERIES = {  # name of the case: label of the row
    "LoRA, {}": "LoRA, separate adapter",
    "LoRA, merged and masked, {}": "LoRA, merged and masked again",
    "MaskedLoRA, {}": "MaskedLoRA, merged",
    "MaskedLoRA, {} in three cuts": "MaskedLoRA, three cuts (steps 0, 20, 40)",
    "MaskedLoRA, {}, distilled": "MaskedLoRA, distilled from the dense model",
    "FullFineTuning, {}": "FullFineTuning",
    "QLoRA, {}": "QLoRA, `form: adapter`",
}


def table(head: Sequence[str], lines: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Returns a Markdown table whose first ``words`` columns are text and whose other columns are numbers.

    Without lines it returns a sentence that says so.
    """
    if not lines:
        return "Not measured yet.\n"
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *lines])


def least_bold(values: Sequence[float | None], places: int = 2, alone: bool = True) -> list[str]:
    """Returns the numbers as text, the smallest in bold, unless it is ``alone``, and an empty text for None."""
    numbers = [value for value in values if value is not None]
    smallest = min(numbers, default=None) if alone or len(numbers) > 1 else None
    texts = ["" if value is None else f"{value:.{places}f}" for value in values]
    return [f"**{text}**" if text and value == smallest else text for text, value in zip(texts, values, strict=True)]


def methods(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities, methods and sparsities x allocations."""
    perplexities = _perplexities(rows)
    lines = [
        [
            str(sparsity),
            method,
            *least_bold([perplexities.get(f"{method}, {rule}, {sparsity}") for rule in ALLOCATIONS]),
        ]
        for sparsity in (0.5, 0.7)
        for method in METHODS
    ]
    return table(["sparsity", "method", *ALLOCATIONS], lines, words=2)


def patterns(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities, methods x N:M patterns."""
    perplexities = _perplexities(rows)
    lines = [[method, *least_bold([perplexities.get(f"{method}, {name}") for name in PATTERNS])] for method in METHODS]
    return table(["method", *PATTERNS], lines)


def propagation(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities for both values of `propagate`."""
    perplexities, lines = _perplexities(rows), []
    defaults = {"Wanda": "dense", "SparseGPT": "pruned"}
    for sparsity in (0.5, 0.7):
        for rule in ("Uniform", "DLP"):
            line = [str(sparsity), rule]
            for method, default in defaults.items():
                suffixes = ["" if way == default else f" (propagate: {way})" for way in ("dense", "pruned")]
                line += least_bold([perplexities.get(f"{method}{end}, {rule}, {sparsity}") for end in suffixes])
            lines.append(line)
    head = [
        f"{method}, {way}{' (default)' if way == default else ''}"
        for method, default in defaults.items()
        for way in ("dense", "pruned")
    ]
    return table(["sparsity", "allocation", *head], lines, words=2)


def searched(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities before and after a search from the best allocation."""
    perplexities, lines = _perplexities(rows), []
    cases = [re.findall(r"^(\w+), Search of \w+ from (\w+), ([\d.]+)$", name) for name in perplexities]
    for method, rule, sparsity in dict.fromkeys(case[0] for case in cases if case):
        searches = [f"{method}, Search of {level} from {rule}, {sparsity}" for level in ("blocks", "linears")]
        cells = [perplexities.get(name) for name in (f"{method}, {rule}, {sparsity}", *searches)]
        lines.append([f"{method} at {sparsity}", rule, *least_bold(cells)])
    return table(["", "from", "before", "Search", "Search, `level: linears`"], lines, words=2)


def equal_mean(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities and parameters of sliced models, mean slices x allocations."""
    by_case, lines = {row["case"]: row for row in rows}, []
    for mean in MEANS:
        cells = [by_case[f"{width}, {mean:.2f}"] for width in WIDTHS]
        marked = least_bold([row["perplexity"] for row in cells])
        sizes = [f"{row['parameters'] / 1e6:.1f} M" for row in cells]
        lines.append([f"{mean:.2f}", *(f"{text} ({size})" for text, size in zip(marked, sizes, strict=True))])
    return table(["mean slice", *map(_heading, WIDTHS)], lines, words=0)


def equal_size(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities of sliced models, sizes of the constant slice x allocations."""
    by_case, lines = {row["case"]: row for row in rows}, []
    for mean in MEANS:
        constant = by_case[f"constant, {mean:.2f}"]
        others = [by_case[f"{width}, size of constant {mean:.2f}"] for width in WIDTHS[1:]]
        marked = least_bold([row["perplexity"] for row in (constant, *others)])
        means = ["", *(f" ({row['sparsity']:.3f})" for row in others)]
        size = f"{mean:.2f} ({constant['parameters'] / 1e6:.1f} M)"
        lines.append([size, *(text + slice_mean for text, slice_mean in zip(marked, means, strict=True))])
    return table(["size of constant", *map(_heading, WIDTHS)], lines, words=0)


def recoveries(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities and bytes, recoveries x sparsities."""
    by_case = {row["case"]: row for row in rows}
    sparsities = sorted({re.findall(r"\d\.\d+", case)[0] for case in by_case})
    cells = {
        (name, sparsity): by_case.get(name.format(sparsity), {"perplexity": {}, "bytes": None})
        for name in RECOVERIES
        for sparsity in sparsities
    }
    columns = {
        sparsity: least_bold([cells[name, sparsity]["perplexity"].get("recovered") for name in RECOVERIES])
        for sparsity in sparsities
    }
    lines = []
    for number, (name, label) in enumerate(RECOVERIES.items()):
        sizes = {cells[name, sparsity]["bytes"] for sparsity in sparsities} - {None}
        size = f"{max(sizes) / 1e6:.1f}" if sizes else ""
        row = [columns[sparsity][number] for sparsity in sparsities]
        if any(row):
            lines.append([label, *row, size])
    return table(["", *sparsities, "MB, adapter included"], lines)


def reconstructions(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities on two texts, cost and memory, with and without reconstruction."""
    pairs: dict[tuple[str, ...], dict[bool, Row]] = {}
    for row in rows:
        match = re.fullmatch(r"(\w+), ([\d.:]+), (\d+) windows(, reconstructed)?", row["case"])
        if match is not None:
            pairs.setdefault(match.groups()[:3], {})[match[4] is not None] = row
    lines = []
    for (method, sparsity, windows), pair in pairs.items():
        cells = [pair.get(reconstructed, {}) for reconstructed in (False, True)]
        texts = ("perplexity", "python_docs")
        perplexities = [text for name in texts for text in least_bold([cell.get(name) for cell in cells], alone=False)]
        multiples = [f"{cell['multiple']:.1f}" if cell else "" for cell in cells]
        peaks = [f"{cell['peak_bytes'] / 1e6:.0f}" if cell else "" for cell in cells]
        lines.append([sparsity, method, windows, *perplexities, *multiples, *peaks])
    head = ["sparsity", "method", "windows", "without", "with", "Python, without", "Python, with"]
    head += ["F, without", "F, with", "MB, without", "MB, with"]
    return table(head, sorted(lines, key=lambda line: (int(line[2]), line[0], METHODS_BY_COST.index(line[1]))), words=2)


def reconstruction_allocations(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities of SparseGPT at 0.7 with reconstruction, by allocation."""
    found = []
    for row in rows:
        match = re.fullmatch(r"SparseGPT(?: by (\w+))?, 0\.7, \d+ windows, reconstructed", row["case"])
        if match is not None:
            found.append((match[1] or "LayerRedundancy", row))
    windows = min((_windows(row["case"]) for _, row in found), default=0)
    kept = [(name, row) for name, row in found if _windows(row["case"]) == windows]
    columns = [least_bold([row[text] for _, row in kept]) for text in ("perplexity", "python_docs")]
    lines = [[name, *texts] for (name, _), *texts in zip(kept, *columns, strict=True)]
    return table(["allocation", "perplexity", "Python"], lines)


def reconstruction_recoveries(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities before and after a recovery that starts from a reconstructed model."""
    lines = []
    for row in rows:
        match = re.fullmatch(r"(\w+), ([\d.]+), from the reconstructed model", row["case"])
        if match is not None:
            lines.append([match[2], match[1], f"{row['pruned']:.2f}", f"{row['perplexity']:.2f}"])
    return table(["sparsity", "recovery", "before", "after"], sorted(lines), words=2)


def shrinking(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities, parameters, bytes and cost of shrunk models without training."""
    lines = []
    for row in rows:
        match = re.fullmatch(rf"([\w ]+) by ([\w ]+), -(\d+)%((?:, (?:{SHRINKING}))*)", row["case"])
        if match is not None:
            size = [f"{row['parameters'] / 1e6:.1f}", f"{row['bytes'] / 1e6:.1f}"]
            cells = [*size, f"{row['perplexity']:.2f}", f"{row['multiple']:.1f}"]
            lines.append([f"-{match[3]}%", match[1] + match[4], match[2], *cells])
    head = ["parameters", "method", "allocation", "M", "MB in 16 bits", "perplexity", "F"]
    return table(head, sorted(lines, key=lambda line: (int(line[0][1:-1]), float(line[5]))), words=3)


def shrinking_healed(rows: Sequence[Row]) -> str:
    """Returns the table of perplexities before and after 100 steps."""
    lines = []
    for row in rows:
        pattern = rf"([\w ]+) by ([\w ]+), -(\d+)%((?:, (?:{SHRINKING}))*), 100 steps of (\w+)"
        match = re.fullmatch(pattern, row["case"])
        if match is not None:
            change = [f"{row['pruned']:.2f}", f"{row['perplexity']:.2f}"]
            lines.append([f"-{match[3]}%", match[1] + match[4], match[2], match[5], _precision(row), *change])
    lines.sort(key=lambda line: (int(line[0][1:-1]), float(line[6])))
    for row in rows:
        if row["case"] == DENSE_TRAINED:
            change = [f"{row['before']:.2f}", f"{row['perplexity']:.2f}"]
            lines.insert(0, ["dense", "", "", "LoRA", _precision(row), *change])
    head = ["parameters", "method", "allocation", "100 steps of", "precision", "before", "after"]
    return table(head, lines, words=5)


def shrinking_speed(rows: Sequence[Row]) -> str:
    """Returns the table of tokens per second of the dense and the shrunk model."""
    lines = []
    for row in rows:
        match = re.fullmatch(r"speed in ([\w.]+), -(\d+)%", row["case"])
        if match is not None:
            cells = [
                f"{row[part]['speeds'][0]:,.1f} to {row[part]['speeds'][1]:,.1f} ({row[part]['ratio']:.2f} x)"
                for part in ("prefill", "decode")
            ]
            lines.append([f"-{match[2]}%", match[1], *cells])
    head = ["parameters", "in", "prefill, tokens per second", "decode, tokens per second"]
    return table(head, sorted(lines, key=lambda line: int(line[0][1:-1])), words=2)


def _precision(row: Row) -> str:
    """Returns the precision of the training of a row, which the first rows do not name."""
    return row.get("precision", "bf16-mixed")


def _windows(case: str) -> int:
    return int(re.findall(r"(\d+) windows", case)[0])


def gpu(rows: Sequence[Row]) -> str:
    """Returns the table of the cases that benchmarks/gpu ran on devices; what it says before anyone has run it."""
    lines = []
    for row in rows:
        if "device" not in row:  # a reference, which ran on the CPU
            continue
        numbers = [row.get("tokens_per_second"), row.get("peak_bytes", 0) / 1e6]
        cells = [f"{number:,.0f}" if number else "" for number in numbers]
        perplexities = [row.get(name) for name in ("perplexity", "expected")]
        cells += ["" if perplexity is None else f"{perplexity:.3f}" for perplexity in perplexities]
        lines.append([row["device"], row["case"], row.get("error") or row.get("note") or "right", *cells])
    if not lines:
        return "Not measured yet: no GPU was available. `make gpu` measures it on yours.\n"
    head = ["device", "case", "result", "tokens per second", "peak memory, MB", "perplexity", "on the CPU"]
    return table(head, lines, words=3)


def _heading(width: str) -> str:
    return re.sub(r"base ([\d.]+) below", r"base = mean - \1", width)


def _perplexities(rows: Sequence[Row]) -> dict[str, float]:
    return {row["case"]: row["perplexity"] for row in rows}


TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "methods": ("papers", methods),
    "patterns": ("papers", patterns),
    "propagation": ("papers", propagation),
    "searched": ("papers", searched),
    "equal mean": ("slices", equal_mean),
    "equal size": ("slices", equal_size),
    "recoveries": ("recoveries", recoveries),
    "reconstruction": ("reconstruction", reconstructions),
    "reconstruction allocations": ("reconstruction", reconstruction_allocations),
    "reconstruction recoveries": ("reconstruction", reconstruction_recoveries),
    "shrinking": ("shrinking", shrinking),
    "shrinking healed": ("shrinking", shrinking_healed),
    "shrinking speed": ("shrinking", shrinking_speed),
    "gpu": ("gpu-*", gpu),
}


def render(text: str) -> str:
    """Returns the text of a page with its tables replaced by those of the measured results."""

    def replaced(block: re.Match[str]) -> str:
        pattern, make = TABLES[block[2]]
        files = sorted(MEASURED.glob(f"{pattern}.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return f"{block[1]}{make(rows)}{block[3]}"

    return BLOCK.sub(replaced, text)


def main() -> None:
    """Updates every page of docs/ that has a table."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        before = page.read_text()
        if (after := render(before)) != before:
            page.write_text(after)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
