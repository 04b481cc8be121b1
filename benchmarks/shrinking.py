"""Perplexity, size, cost and speed of shrunk models, untrained and after 100 steps of training.

    python benchmarks/shrinking.py --pretrained FOLDER --train_files TEXT --val_files RAW
    python benchmarks/shrinking.py --pretrained FOLDER --train_files TEXT --val_files RAW --cases "MLPWidth.*-15%"
    python benchmarks/shrinking.py --num_samples 8 --seq_length 256 --val_length 256   # the embedded model

Shares are those of all parameters of the dense model, embeddings included. Cases come in the order of their importance;
`--cases` is a regular expression of those to run. The results file (--results) has one JSON object per case; cases that
it contains are not run again. `multiple` is the CPU time of scoring and shrinking in multiples of F, one plain forward
pass of the windows through the decoder, and `bytes` those of the parameters in 16 bits. The dense and the shrunk model
of a speed case generate by turns in one process; llama.cpp runs both as .gguf files in f16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import recoveries
import tables
import yaml
from forwards import cost, forward_seconds
from jsonargparse import ArgumentParser
from resumable import MatchingCases, Protocol, Results, Row
from speed import in_llama_cpp, in_transformers
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, Allocation, LayerRedundancy, Plan, Search, Uniform
from lit_prune.allocate.plan import write_plan
from lit_prune.depth import Depth
from lit_prune.evaluation.perplexity import measure
from lit_prune.evaluation.sizes import parameters
from lit_prune.models.load import load_config, load_model
from lit_prune.pipeline import prune
from lit_prune.pruning import Method
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from lit_prune.slice import Slicing, sizes_from_rates, sliced_parameters

SHARES = (0.15, 0.30, 0.20, 0.10)  # of all parameters, by importance
MORE = 4  # times the calibration windows, for the cases that show what more of them are worth
HEALINGS = {
    "LoRA": ["--pruning.recovery=LoRA", "--pruning.recovery.r=16"],
    "distillation": ["--pruning.recovery=LoRA", "--pruning.recovery.r=16", "--pruning.distillation.weight=0.5"],
}
NOTHING = ["--pruning.method=null", "--pruning.sparsity=null", "--pruning.allocation=null"]  # is pruned


def allocations(folder: Path, share: float) -> Iterator[Allocation]:
    """Yields the allocations of MLPWidth besides Uniform."""
    yield from (DLP(), LayerRedundancy())
    yield Search(LayerRedundancy(), state=str(folder / f"search-layer-redundancy-{share}.json"))
    yield Search(Uniform(), state=str(folder / f"search-{share}.json"))


def mixture(folder: Path, share: float) -> tuple[str, Recipe]:
    """Returns the name and the recipe of the case in which a search finds how much each part loses."""
    state = str(folder / f"search-parts-{share}.json")
    search = Search(Uniform(), level="parts", state=state)
    return by_share(Shrink([MLPWidth(), HeadGroups()]), share, search)


def by_share(method: Method, share: float, allocation: Allocation, name: str | None = None) -> tuple[str, Recipe]:
    """Returns the name and the recipe of a case by its share of all parameters."""
    rule = type(allocation).__name__
    if isinstance(allocation, Search) and not isinstance(allocation.start, Uniform):
        rule += f" from {type(allocation.start).__name__}"
    name = f"{name or type(method).__name__} by {rule}, -{share:.0%}"
    return name, Recipe(method, share, allocation, budget="parameters")


def setting(value: Any) -> Any:
    """Returns a setting of a recipe as a configuration file has it, objects by `class_path` and `init_args`."""
    if is_dataclass(value):
        return {
            "class_path": type(value).__name__,
            "init_args": {field.name: setting(getattr(value, field.name)) for field in fields(value)},
        }
    return [setting(each) for each in value] if isinstance(value, list) else value


def widths() -> Iterator[tuple[str, Recipe]]:
    """Yields the name and the recipe of the cuts of channels that cases improve, by equal and by different widths."""
    for share in SHARES:
        yield from (by_share(MLPWidth(), share, allocation) for allocation in (Uniform(), LayerRedundancy()))


def untrained(folder: Path) -> Iterator[tuple[str, Recipe]]:
    """Yields the name and the recipe of every case without training, besides those of slices."""
    for share in SHARES:
        yield by_share(MLPWidth(), share, Uniform())
    for name, recipe in widths():
        yield f"{name}, reconstructed", replace(recipe, reconstruction=Reconstruct())
    for share in SHARES:
        yield from (by_share(MLPWidth(), share, allocation) for allocation in allocations(folder, share))
    for share in SHARES:
        yield mixture(folder, share)
    for allocation in (Uniform(), LayerRedundancy()):
        yield by_share(HeadGroups(), min(SHARES), allocation)  # the others are more than all groups but one
    for share in SHARES:
        for contiguous, refit in ((False, False), (False, True), (True, False), (True, True)):
            name, recipe = by_share(Depth(contiguous=contiguous, refit=refit), share, Uniform())
            yield f"{name}{', neighbours' * contiguous}{', refitted' * refit}", recipe
    for share in SHARES:
        yield by_share(Shrink([Depth(), MLPWidth()], [0.5, 1]), share, Uniform(), "Depth and MLPWidth")
    for share in SHARES:
        name, recipe = by_share(MLPWidth(compensate=False), share, Uniform())
        yield f"{name}, not compensated", recipe


def with_more_text(windows: int) -> Iterator[tuple[str, Recipe]]:
    """Yields the name and the recipe of every case without training that is calibrated on so many windows."""
    for name, recipe in widths():
        yield f"{name}, {windows} windows", recipe


class Cases(MatchingCases):
    """The cases of shrinking."""

    def measured(self, model: PreTrainedModel) -> Row:
        """Returns the perplexity and the size of ``model``."""
        data, count = self.protocol.data, parameters(model)
        perplexity = measure(model, data.val_dataloader(), data.describe("val")).perplexity
        return {"perplexity": perplexity, "parameters": count, "bytes": 2 * count}

    def dense(self) -> Row:
        """Returns the row of the dense model."""
        return self.measured(load_model(self.protocol.pretrained, "float32"))

    def cut(self, recipe: Recipe, times: int = 1) -> Row:
        """Returns the row of a recipe with so many times the windows, run between two plain forward passes."""
        protocol = self._calibrated_on(times)
        model, batches = load_model(protocol.pretrained, "float32"), protocol.batches()
        with self.protocol.products():
            before = forward_seconds(model, batches)
            with cost() as spent:
                pruned = prune(model, batches, recipe)
            after = forward_seconds(load_model(protocol.pretrained, "float32"), batches)
        return self.measured(model) | {
            "rates": pruned.rates,
            "parts": pruned.parts,
            "seconds": spent.seconds,
            "multiple": 2 * spent.cpu_seconds / (before + after),
            "peak_bytes": spent.peak_bytes,
            "matmul_precision": protocol.matmul_precision,
        }

    def sliced(self, share: float) -> Row:
        """Returns the row of the slice that leaves at most the parameters of the dense model without ``share``."""
        target = (1 - share) * parameters(load_model(self.protocol.pretrained, "float32"))
        low, high = 0.0, 0.95  # mean slice
        while high - low > 0.005:
            middle = (low + high) / 2
            low, high = (low, middle) if self._sliced_parameters(middle) <= target else (middle, high)
        return self.cut(Recipe(Slicing(), round(high, 3), Uniform())) | {"slice": round(high, 3)}

    def _sliced_parameters(self, mean: float) -> int:
        config = load_config(self.protocol.pretrained)
        full, blocks = config.hidden_size, config.num_hidden_layers
        sizes = sizes_from_rates([mean] * blocks, full, Slicing().multiple)
        return sliced_parameters(config, [*sizes, full])

    def healed(self, recipe: Recipe, row: Row | None, options: Sequence[str], folder: Path, times: int = 1) -> Row:
        """Returns the row of a fit with 100 steps after the cut by ``recipe``.

        Args:
            recipe: The recipe of the cut.
            row: The row of the cut without training, whose rates a search is replaced by; None without one.
            options: The options of the recovery.
            folder: Folder of the run.
            times: How many times the calibration windows of the protocol.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if recipe.allocation.searches and row is not None:
            plan, rates = folder / "plan.yaml", row["rates"]
            write_plan(plan, rates, rates, "Rates of a search, by block.", row.get("parts"))
            # of rounded rates, the share of all parameters is not exactly the one that was asked for
            recipe = replace(recipe, allocation=Plan(str(plan)), sparsity=sum(rates) / len(rates), budget="linears")
        pruning = {
            "method": setting(recipe.method),
            "allocation": setting(recipe.allocation),
            "budget": recipe.budget,
            "sparsity": recipe.sparsity,
        }
        config = folder / "pruning.yaml"
        config.write_text(yaml.safe_dump({"pruning": pruning}))
        return recoveries.fit_by(self._calibrated_on(times), [f"--config={config}", *options], folder / "run")

    def speed(self, share: float, runtime: Any) -> Row:
        """Returns the tokens per second of the dense model and of MLPWidth by Uniform, which no weight changes."""
        dense, shrunk = (load_model(self.protocol.pretrained, "float32") for _ in range(2))
        prune(shrunk, self.protocol.batches()[:1], by_share(MLPWidth(compensate=False), share, Uniform())[1])
        return runtime(dense, shrunk)

    def run(self) -> None:
        """Runs the cases in the order of their importance."""
        folder = self.results.path.parent
        self.once("dense", self.dense)
        cuts = list(untrained(folder))
        self._cuts(cuts[: len(SHARES)])
        more = list(with_more_text(MORE * self.protocol.num_samples))
        for name, recipe in more:
            self.once(name, partial(self.cut, recipe, MORE))
        self._healed(*cuts[0], folder)
        dense = partial(recoveries.fit_by, self.protocol, [*NOTHING, *HEALINGS["LoRA"]], folder / "dense")
        self.once(tables.DENSE_TRAINED, dense)
        for share in sorted(SHARES, key=lambda share: abs(share - 0.20)):
            self.once(f"speed in transformers, -{share:.0%}", partial(self.speed, share, in_transformers))
            llama_cpp = partial(in_llama_cpp, tokenizer=self.protocol.data.tokenizer)
            self.once(f"speed in llama.cpp, -{share:.0%}", partial(self.speed, share, llama_cpp))
        self._cuts(cuts[len(SHARES) :])
        for share in SHARES:
            name = f"Slicing by Uniform, -{share:.0%}"
            self.once(name, partial(self.sliced, share))
            if (row := self._row(name)) is not None:
                cuts.append((name, Recipe(Slicing(), row["slice"], Uniform())))
        for name, recipe in more:
            self._healed(name, recipe, folder, MORE)
        for name, recipe in cuts[1:]:
            if recipe.reconstruction is None and "not compensated" not in name:
                self._healed(name, recipe, folder)

    def _cuts(self, cases: list[tuple[str, Recipe]]) -> None:
        for name, recipe in cases:
            self.once(name, partial(self.cut, recipe))

    def _calibrated_on(self, times: int) -> Protocol:
        """Returns the protocol with so many times the calibration windows."""
        return replace(self.protocol, num_samples=times * self.protocol.num_samples)

    def _healed(self, name: str, recipe: Recipe, folder: Path, times: int = 1) -> None:
        row = self._row(name)
        if recipe.allocation.searches and row is None:
            return
        for healing, options in HEALINGS.items():
            case = f"{name}, 100 steps of {healing}"
            run = folder / case.replace(", ", "-").replace(" ", "_").replace("%", "")
            self.once(case, partial(self.healed, recipe, row, options, run, times))

    def _row(self, name: str) -> Row | None:
        return next((row for row in self.results.rows if row["case"] == name), None)


def main() -> None:
    """Runs the missing cases and prints the tables."""
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(Protocol, as_group=False)
    parser.add_argument("--results", default="runs/shrinking/results.jsonl", help="Results file.")
    parser.add_argument("--cases", default="", help="Regular expression of the names of the cases to run.")
    parser.set_defaults(num_samples=16, val_windows=6)
    settings = parser.parse_args()
    results, pattern = Results(settings.pop("results")), settings.pop("cases")
    Cases(Protocol(**settings.as_dict()), results, pattern).run()
    for name in ("shrinking", "shrinking healed", "shrinking speed"):
        print(tables.TABLES[name][1](results.rows))


if __name__ == "__main__":
    main()
