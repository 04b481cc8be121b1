"""A method that changes a model's shape is one file: two small ones, which nothing in the package knows.

DropBlocks removes whole blocks, NarrowMLP the same number of channels from every MLP. Both leave an ordinary Llama.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from lit_prune.allocate import Allocation, LayerRedundancy
from lit_prune.calibration.statistics import BlockStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.cli.main import main
from lit_prune.errors import InputError
from lit_prune.models.families import Block
from lit_prune.models.load import load_tokenizer
from lit_prune.models.structure import Description, Structure, add_structure, describe, structures
from lit_prune.pipeline import prune
from lit_prune.pruning.base import Method
from lit_prune.recipe import Recipe
from lit_prune.reconstruct.reconstruction import Reconstruction
from lit_prune.recover import Snapshot
from tests.conftest import small_model


@final
@dataclass(frozen=True)
class Depth(Structure):
    """The blocks of the dense model that remain."""

    remaining: Sequence[int]
    blocks: int

    def rebuild(self, model: PreTrainedModel) -> None:
        body: Any = model.base_model
        if len(body.layers) != self.blocks:
            return
        body.layers = nn.ModuleList(body.layers[index] for index in self.remaining)
        for index, layer in enumerate(body.layers):
            layer.self_attn.layer_idx = index  # where its keys and values are in the cache
        model.config.num_hidden_layers = len(self.remaining)

    def describe(self, model: PreTrainedModel) -> Description:
        share = 1 - len(self.remaining) / self.blocks
        return Description(
            name="depth",
            facts={"remaining": list(self.remaining), "blocks": self.blocks, "achieved": share},
            done="Shortened",
            outcome=f"{len(self.remaining)} of {self.blocks} blocks remain.",
            rows={"blocks that remain": f"{len(self.remaining)} of {self.blocks}"},
            unit="blocks",
            noun="block",
            sizes=tuple(int(index in self.remaining) for index in range(self.blocks)),
            full=1,
            achieved=share,
        )


@final
@dataclass(frozen=True)
class DropBlocks(Method):
    """Removes the blocks with the highest rates, as many as the sparsity makes whole ones."""

    chooses_linears: ClassVar[bool] = False
    changes_shapes: ClassVar[bool] = True

    @classmethod
    def default_allocation(cls) -> type[Allocation]:
        return LayerRedundancy

    def check_rates(
        self, model: PreTrainedModel, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        if allocation.is_uniform():
            raise InputError("`pruning.allocation` must score the blocks for DropBlocks, got Uniform.")

    def repeats(self) -> bool:
        return False

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        return [1] * len(blocks)

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        first = sorted(range(len(rates)), key=lambda block: -rates[block])[: round(sum(rates))]
        return [float(block in first) for block in range(len(rates))]

    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        statistics: Sequence[BlockStatistics],
        device: torch.device,
        stream: Callable[[], Stream],
        reconstruction: Reconstruction | None = None,
    ) -> list[float]:
        shape = Depth([block.index for block in blocks if rates[block.index] == 0], len(blocks))
        shape.rebuild(model)
        add_structure(model, shape)
        return list(rates)


@final
@dataclass(frozen=True)
class Width(Structure):
    """The number of channels that every MLP keeps."""

    channels: int
    full: int

    def rebuild(self, model: PreTrainedModel) -> None:
        for layer in model.base_model.layers:  # type: ignore[union-attr]
            narrow(layer.mlp, torch.arange(self.channels, device=layer.mlp.down_proj.weight.device))  # type: ignore[union-attr]
        model.config.intermediate_size = self.channels

    def describe(self, model: PreTrainedModel) -> Description:
        share = 1 - self.channels / self.full
        return Description(
            name="mlp_width",
            facts={"channels": self.channels, "full": self.full, "achieved": share},
            done="Narrowed",
            outcome=f"every MLP has {self.channels} of its {self.full} channels.",
            rows={"channels of the MLPs": f"{self.channels} of {self.full}"},
            unit="channels of the MLP",
            noun="width",
            sizes=(self.channels,) * model.config.num_hidden_layers,
            full=self.full,
            achieved=share,
        )


@final
@dataclass(frozen=True)
class NarrowMLP(Method):
    """Removes the channels of each MLP whose columns of W_down have the smallest norms, everywhere as many."""

    chooses_linears: ClassVar[bool] = False
    changes_shapes: ClassVar[bool] = True
    keeps_values: ClassVar[bool] = True

    def check_rates(
        self, model: PreTrainedModel, blocks: Sequence[Block], allocation: Allocation, sparsity: float
    ) -> None:
        if not allocation.is_uniform():
            raise InputError("`pruning.allocation` must be Uniform for NarrowMLP.")

    def sizes(self, model: PreTrainedModel, blocks: Sequence[Block]) -> list[int]:
        return [model.config.intermediate_size] * len(blocks)

    def rates(self, rates: Sequence[float], sizes: Sequence[int]) -> list[float]:
        return [round(rate * size) / size for rate, size in zip(rates, sizes, strict=True)]

    def apply(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        *,
        rates: Sequence[float],
        statistics: Sequence[BlockStatistics],
        device: torch.device,
        stream: Callable[[], Stream],
        reconstruction: Reconstruction | None = None,
    ) -> list[float]:
        full = model.config.intermediate_size
        channels = full - round(full * rates[0])
        for block in blocks:
            mlp: Any = block.module.mlp
            narrow(mlp, mlp.down_proj.weight.norm(dim=0).topk(channels).indices.sort().values)
        shape = Width(channels, full)
        shape.rebuild(model)
        add_structure(model, shape)
        return list(rates)


def narrow(mlp: Any, kept_I: Tensor) -> None:
    """Keeps the channels ``kept_I`` of an MLP, unless it is as narrow already."""
    if mlp.down_proj.in_features == len(kept_I):
        return
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight, linear.out_features = nn.Parameter(linear.weight.detach()[kept_I]), len(kept_I)
    linear = mlp.down_proj
    linear.weight, linear.in_features = nn.Parameter(linear.weight.detach()[:, kept_I]), len(kept_I)


@dataclass(frozen=True)
class Given(Allocation):
    """Rates of 0 and 1 by hand, such as an allocation may choose that sees scores."""

    chosen: Sequence[float] = (0.0, 1.0, 0.0)

    def score(self, weights: dict[str, Tensor], observed: BlockStatistics) -> float:
        return 0.0

    def raw_rates(self, scores: Sequence[float], sparsity: float) -> list[float]:
        return list(self.chosen)


RECIPES = [
    Recipe(DropBlocks(), 1 / 3),
    Recipe(DropBlocks(), 1 / 3, Given(), max_rate=1.0),
    Recipe(NarrowMLP(), 0.25),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.method}-{recipe.allocation}")
def test_the_folder_is_an_ordinary_llama(recipe: Recipe, batches: list[Tensor], tmp_path: Path) -> None:
    model = small_model()
    pruned = prune(model, batches, recipe)
    assert pruned.sparsity == pytest.approx(recipe.sparsity)
    expected = model(batches[0]).logits
    assert not torch.allclose(expected, small_model()(batches[0]).logits)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is LlamaForCausalLM
    torch.testing.assert_close(opened(batches[0]).logits, expected)
    assert structures(opened) == structures(model)
    assert opened.generate(batches[0][:1], max_new_tokens=4, do_sample=False).tolist() == (
        model.generate(batches[0][:1], max_new_tokens=4, do_sample=False).tolist()
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.method}-{recipe.allocation}")
def test_a_checkpoint_is_rebuilt_from_its_snapshot(recipe: Recipe, batches: list[Tensor]) -> None:
    model = small_model()
    prune(model, batches, recipe)
    stored, fresh = json.loads(json.dumps(Snapshot.of(model).to_dict())), small_model()
    for _ in range(2):
        Snapshot.from_dict(stored).rebuild(fresh)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(batches[0]).logits, model(batches[0]).logits)
    assert Snapshot.of(fresh) == Snapshot.of(model)


def test_the_block_with_the_highest_rate_goes(batches: list[Tensor]) -> None:
    model, dense = small_model(), small_model()
    pruned = prune(model, batches, Recipe(DropBlocks(), 1 / 3, Given(), max_rate=1.0))
    assert pruned.achieved == [0, 1, 0]
    assert structures(model) == (Depth([0, 2], 3),)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, dense.model.layers[2].mlp.up_proj.weight)
    assert [described.sizes for described in describe(model)] == [(1, 0, 1)]


def test_the_channels_with_the_smallest_columns_go(batches: list[Tensor]) -> None:
    model, dense = small_model(), small_model()
    prune(model, batches, Recipe(NarrowMLP(), 0.25))
    weight_OI = dense.model.layers[0].mlp.down_proj.weight
    norms = weight_OI.norm(dim=0)
    kept = norms > norms.sort().values[11]
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weight_OI[:, kept])
    assert describe(model)[0].rows == {"channels of the MLPs": "36 of 48"}


def test_the_command_reports_what_the_structure_describes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")  # Lightning's advice is no error here
    for part in ("train", "val"):
        Path(f"{part}.txt").write_text("Return the number of {part} items, or raise an error.\n" * 200)
    tokenizer = load_tokenizer("embedded")
    small_model(vocab_size=len(tokenizer)).save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    main(
        [
            "prune",
            "--output=out",
            "--model.pretrained=dense",
            "--data.train_files=train.txt",
            "--data.val_files=val.txt",
            "--data.seq_length=32",
            "--data.val_seq_length=32",
            "--pruning.calibration.num_samples=4",
            "--pruning.calibration.seq_length=32",
            f"--pruning.method={__name__}.DropBlocks",
            "--pruning.allocation=LayerRedundancy",
            "--pruning.sparsity=0.3",
        ]
    )
    report = json.loads(Path("out/report.json").read_text())
    assert report["depth"]["blocks"] == 3
    assert len(report["depth"]["remaining"]) == 2
    assert "2 of 3 blocks remain." in Path("out/model/README.md").read_text()
    assert "blocks that remain" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("out/model").config.num_hidden_layers == 2
