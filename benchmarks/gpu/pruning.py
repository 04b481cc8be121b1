"""Cases of pruning: masks, slices, rates and trials that a device computes, compared with the CPU's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.case import Case, Row, Settings, WrongResultError, now
from benchmarks.gpu.masks import Difference, compare_masks
from lit_prune.allocate import DLP, OWL, Allocation, AlphaPruning, LayerRedundancy
from lit_prune.calibration.cached_statistics import CachedStatistics
from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import evaluating, measure
from lit_prune.models.families import find_blocks
from lit_prune.models.load import load_model
from lit_prune.models.on_disk import offload_folder
from lit_prune.pipeline import prune, score_with_statistics
from lit_prune.pruning import Magnitude, Method, SparseGPT, Wanda
from lit_prune.pruning.mask_method import ScoredMethod
from lit_prune.recipe import Recipe
from lit_prune.slice import Slicing

Place = Literal["model", "blocks", "disk"]
PLACES = {
    "model": "whole model on the device",
    "blocks": "weights on the CPU, blocks on the device",
    "disk": "weights on disk, blocks on the device",
}
RATE_TOLERANCE = 1e-4
MASK_TOLERANCE = 1e-3  # of SparseGPT, where one tie changes later weights, and with them their scores


@final
@dataclass(frozen=True)
class Pruning(Case):
    """Masks or slices made on the device, compared with those made on the CPU in the same process."""

    method: Method
    place: Place
    tolerance: float = 1e-3

    @property
    def name(self) -> str:
        """The method, and where the weights are."""
        return f"{type(self.method).__name__}, {PLACES[self.place]}"

    def run(self, settings: Settings, device: torch.device) -> Row:
        """Prunes on the CPU, then on the device."""
        data = settings.data()
        batches, recipe = settings.batches(data), settings.recipe(self.method)
        on_cpu = load_model(settings.pretrained, "float32")
        scores = _scores(on_cpu, batches, recipe)
        prune(on_cpu, batches, recipe)
        expected = measure(on_cpu, data.val_dataloader(), "").perplexity
        with self._loaded(settings, device) as model:
            begin = now(device)
            prune(model, batches, recipe, device=device)
            seconds = now(device) - begin
            streamed = self.place == "blocks" and not self.method.changes_shapes
            moved = model if streamed or self.place == "disk" else model.to(device)  # type: ignore[arg-type]
            found = measure(moved, data.val_dataloader(), "", device=device, streamed=streamed).perplexity
            note = "" if self.method.changes_shapes else self._compared(on_cpu, model, scores)
        return {
            "perplexity": found,
            "expected": expected,
            "tokens_per_second": settings.num_samples * settings.seq_length / seconds,
            "note": note,
        }

    @contextmanager
    def _loaded(self, settings: Settings, device: torch.device) -> Iterator[PreTrainedModel]:
        """Yields the dense model in float32, where ``place`` says."""
        model = load_model(settings.pretrained, "float32")
        if self.place != "disk":
            yield model.to(device) if self.place == "model" else model  # type: ignore[arg-type]
            return
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)  # in the type that it is used in, as a model on disk must be
            mapped = load_model(folder, on_disk=True)
            with offload_folder(mapped, Path(folder) / "pruned"):
                yield mapped

    def _compared(self, on_cpu: PreTrainedModel, model: PreTrainedModel, scores: Sequence[dict[str, Tensor]]) -> str:
        """Returns the difference of the masks in words; raises WrongResultError if it is more than ties."""
        total = Difference()
        by_row = isinstance(self.method, ScoredMethod) and self.method.by_row
        for one, other, block_scores in zip(find_blocks(on_cpu), find_blocks(model), scores, strict=True):
            for name, linear in one.linears.items():
                masks = [weight.cpu() != 0 for weight in (linear.weight_OI, other.linears[name].weight_OI)]
                total += compare_masks(*masks, block_scores.get(name, masks[0].float()), by_row=by_row)
        note = f"{total.differing} of {total.weights} weights are in only one mask"
        allowed = total.ties if any(scores) else MASK_TOLERANCE * total.weights
        if total.differing > allowed:
            raise WrongResultError(f"{note}, {total.ties} of them by ties")
        return f"{note}, all by ties" if any(scores) and total.differing else note


def _scores(model: PreTrainedModel, batches: list[Batch], recipe: Recipe) -> list[dict[str, Tensor]]:
    """Returns the score of every weight of each dense block; empty for a method that changes them as it prunes."""
    blocks, method = find_blocks(model), recipe.method
    if not isinstance(method, ScoredMethod):
        return [{} for _ in blocks]
    _, cached = score_with_statistics(model, batches, recipe)
    return [
        {name: method.score(linear.weight_OI, statistics.input_of(name)) for name, linear in block.linears.items()}
        for block, statistics in zip(blocks, cached.by_block, strict=True)
    ]


@final
@dataclass(frozen=True)
class Rates(Case):
    """The rates of an allocation, from weights on the CPU and blocks on the device, compared with the CPU's."""

    allocation: Allocation

    @property
    def name(self) -> str:
        """The allocation."""
        return f"rates of {type(self.allocation).__name__}"

    def run(self, settings: Settings, device: torch.device) -> Row:
        """Scores the blocks on both devices."""
        model, recipe = load_model(settings.pretrained, "float32"), settings.recipe(Wanda(), self.allocation)
        batches = settings.batches(settings.data())
        expected, _ = score_with_statistics(model, batches, recipe)
        begin = now(device)
        found, _ = score_with_statistics(model, batches, recipe, device=device)
        seconds = now(device) - begin
        difference = max(abs(one - other) for one, other in zip(found.rates, expected.rates, strict=True))
        if difference > RATE_TOLERANCE:
            raise WrongResultError(f"a rate differs by {difference:.2g}, more than {RATE_TOLERANCE:.0e}")
        speed = settings.num_samples * settings.seq_length / seconds
        return {"tokens_per_second": speed, "note": f"rates differ by at most {difference:.1e}"}


@final
@dataclass(frozen=True)
class TrialLoss(Case):
    """The loss of a search's trial, with the whole model on the device, compared with the CPU's."""

    method: Method
    tolerance: float = 1e-3

    @property
    def name(self) -> str:
        """The method."""
        return f"trial of a search, {type(self.method).__name__}"

    def run(self, settings: Settings, device: torch.device) -> Row:
        """Tries the same rates on both devices."""
        batches = settings.batches(settings.data())
        model, recipe = load_model(settings.pretrained, "float32"), settings.recipe(self.method)
        _, cached = score_with_statistics(model, batches, recipe)
        expected, found = (self._loss(model, batches, recipe, cached, where) for where in (torch.device("cpu"), device))
        if abs(found / expected - 1) > self.tolerance:
            raise WrongResultError(f"the loss is {found:.5f}, on the CPU {expected:.5f}")
        return {"note": f"loss {found:.5f}, on the CPU {expected:.5f}"}

    def _loss(
        self, model: PreTrainedModel, batches: list[Batch], recipe: Recipe, cached: CachedStatistics, at: torch.device
    ) -> float:
        blocks = find_blocks(model)
        rates = [recipe.sparsity * (0.5 if block.index % 2 else 1.5) for block in blocks]
        trial = self.method.trial(model, blocks, statistics=cached.by_block, device=at, batches=batches)
        with evaluating(model), trial as opened:
            return opened.loss(rates, 0)


def cases() -> list[Case]:
    """Returns the cases of pruning."""
    places: tuple[Place, ...] = ("model", "blocks", "disk")
    masks = [Pruning(method, place) for method in (Magnitude(), Wanda()) for place in places]
    others = [Pruning(method, place, tolerance=1e-2) for method in (SparseGPT(), Slicing()) for place in places]
    rates = [Rates(allocation) for allocation in (DLP(), OWL(), AlphaPruning(), LayerRedundancy())]
    return [*masks, *others, *rates, TrialLoss(Wanda()), TrialLoss(Slicing())]
