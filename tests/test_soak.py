"""A random walk of configurations for a given time: prune, recover, export, reopen; every promise is kept.

    LIT_PRUNE_SOAK_SECONDS=3600 make soak

Each walk's seed is in the failure, and LIT_PRUNE_SEED begins with it. Configurations that make no sense must be refused
in a line, with nothing written.
"""

import gc
import json
import os
import random
import re
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lit_prune.callbacks import DynamicPruningCallback, ResultsCallback, RunCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.allocate import DLP, OWL, AlphaPruning, LayerRedundancy, Search, Uniform
from lit_prune.calibration.windows import Calibration
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.quantised import compute_exactly
from lit_prune.pruning import Magnitude, MixedNofM, NofM, SparseGPT, Unstructured, Wanda
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA
from lit_prune.schedule import Cubic, Linear
from lit_prune.shrink import HeadGroups, MLPWidth
from lit_prune.slice import Slicing
from tests.callbacks.test_combinations import Gone, pruned
from tests.callbacks.test_dynamic_pruning import QUIET, Foreign, loader
from tests.conftest import WIDE, lively_model

SEED = int(os.environ.get("LIT_PRUNE_SEED", "0"))
SECONDS = float(os.environ.get("LIT_PRUNE_SOAK_SECONDS", "120"))
STEPS, WARM, MB, MOST_MB = 4, 10, 2**20, 100
FAMILIES = ("llama", "opt", "qwen2", "phi", "gpt2", "gemma3_text", "mixtral")
HALF_A_SIZE = {Slicing: 0.1, MLPWidth: 0.1, HeadGroups: 0.26}  # 8 of 64, 8 or 16 of 128, 1 of 2
ROUNDING = {MixedNofM: 0.1, NofM: 1e-3, Unstructured: 1e-3}  # of the budget; shapes are asked by their report


class Somebodys(Foreign):
    """Somebody's own module around a small model of a family, no bias of it zero: those would count."""

    def __init__(self, family: str) -> None:
        LightningModule.__init__(self)
        self.model = lively_model(family, **WIDE)


def drawn(draw: random.Random) -> dict[str, Any]:
    """The settings of a callback, of which some make no sense together."""
    pattern = draw.choice([Unstructured(), Unstructured(), NofM(2, 4), MixedNofM(8)])
    smaller = draw.choice([MLPWidth(multiple=8), HeadGroups(), MLPWidth(multiple=16, compensate=False)])
    method = draw.choice([Magnitude(pattern), Wanda(pattern), SparseGPT(pattern), Slicing(), smaller])
    even = isinstance(pattern, NofM) and method.makes_zeros
    starts = [DLP(), OWL(), AlphaPruning(), LayerRedundancy(), Uniform()]
    searched = Search(start=draw.choice(starts), evaluations=14, windows=1)
    steps = sorted(draw.sample(range(STEPS), draw.choice([1, 1, 1, 2, 3])))
    dropout, r = draw.choice([0.0, 0.2]), draw.choice([2, 8])
    qlora = [
        QLoRA(r=r, form="merged", dropout=dropout),
        QLoRA(r=r, quantization=draw.choice(["nf4", "int8"])),
        QLoRA(r=r, form="requantised", quantization="int8"),
    ]
    recoveries = [LoRA(r=r, dropout=dropout), MaskedLoRA(r=r, dropout=dropout), FullFineTuning(), draw.choice(qlora)]
    return {
        "method": method,
        "sparsity": 0.5 if even else round(draw.uniform(0.05, 0.7), 2),
        "allocation": Uniform() if even else draw.choice([*starts, searched]),
        "at_step": steps[0] if len(steps) == 1 else steps,
        "schedule": None if len(steps) == 1 else draw.choice([Cubic(), Linear(), None]),
        "before": draw.choice([None, LoRA(), MaskedLoRA()]) if steps[0] > 0 else None,
        "recovery": draw.choice(recoveries),
        "calibration": Calibration(num_samples=4, seq_length=16, seed=draw.randrange(99)),
        "budget": draw.choice(["linears", "linears", "parameters"]),
        "full_checkpoint": draw.choice([False, True]),
    }


def walk(settings: dict[str, Any], family: str, folder: Path) -> str:
    """One run and what it promises; returns `kept` or `refused`."""
    module, gone = Somebodys(family), Gone()
    try:
        fit(settings, module, gone, folder / "run")
    except InputError as error:
        refusal = str(error)
    else:
        assert_kept(settings, module.model.eval(), gone.zero, folder / "run")
        return "kept"
    assert re.fullmatch(r"`[\w.]+` .+", refusal), refusal
    assert list(folder.iterdir()) == []
    return "refused"


def fit(settings: dict[str, Any], module: Foreign, gone: Gone, run: Path) -> None:
    callbacks = [
        ResultsCallback(str(run), overwrite=True),
        DynamicPruningCallback(**settings),
        gone,
        RunCheckpoint(str(run / "checkpoints"), 2),
    ]
    trainer = Trainer(**QUIET, max_steps=STEPS, callbacks=callbacks, default_root_dir=run.parent)
    trainer.fit(module, loader(rows=16), loader(1, rows=8))


def assert_kept(settings: dict[str, Any], model: PreTrainedModel, gone: dict[str, Tensor], run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    opened = AutoModelForCausalLM.from_pretrained(run / "model")
    compute_exactly(opened)
    assert_budget(settings, report)
    if settings["method"].makes_zeros:
        assert_zeros(gone, pruned(opened))
    assert_perplexity(opened, model, report, loader(1, rows=8))
    assert list(run.rglob(".*.partial-*")) == []
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEPS
    assert sorted(path.name for path in run.iterdir()) == ["blocks.png", "checkpoints", "model", "report.json"]


def assert_zeros(gone: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Asserts that the zeros of the last cut are in the folder."""
    assert gone.keys() == after.keys()
    assert any(zero.any() for zero in gone.values())
    for name, zero in gone.items():
        assert after[name][zero].all(), name


def assert_budget(settings: dict[str, Any], report: dict[str, Any]) -> None:
    method = settings["method"]
    if method.changes_shapes:
        shape = report["slice" if isinstance(method, Slicing) else method.sizes_class.name]
        kept = shape["pruned"]["parameters"] / shape.get("dense", shape.get("before"))["parameters"]
        achieved = 1 - kept if settings["budget"] == "parameters" else shape["achieved"]
        assert achieved == pytest.approx(settings["sparsity"], abs=HALF_A_SIZE[type(method)])
        return
    told = report["sparsity"]
    key = "achieved_all" if settings["budget"] == "parameters" else "achieved_linears"
    assert told[key] == pytest.approx(settings["sparsity"], abs=ROUNDING[type(method.pattern)])


def assert_perplexity(opened: PreTrainedModel, model: PreTrainedModel, report: dict[str, Any], val: DataLoader) -> None:
    values = report["perplexity"]
    expected = values.get("requantised") or values["recovered"]
    assert measure(opened, val, "val").perplexity == pytest.approx(expected, rel=1e-3)
    assert measure(model, val, "val").perplexity == pytest.approx(values["recovered"], rel=1e-3)


def live() -> int:
    """The tensors that are alive."""
    gc.collect()
    return sum(isinstance(found, Tensor) for found in gc.get_objects())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.filterwarnings("ignore")
def test_a_random_walk_of_configurations(tmp_path: Path) -> None:
    seed, begin, ended = SEED, time.monotonic(), Counter[str]()
    tensors = memory = 0
    while time.monotonic() - begin < SECONDS or seed - SEED < WARM + 2:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        settings, family = drawn(draw), draw.choice(FAMILIES)
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            ended[walk(settings, family, folder)] += 1
        except BaseException as error:
            error.add_note(f"LIT_PRUNE_SEED={seed}: {family}, {settings}")
            raise
        seed += 1
        if seed - SEED == WARM:
            tensors, memory = live(), resident_bytes()
    grown = (resident_bytes() - memory) / MB
    print(f"{dict(ended)} from seed {SEED}; tensors {tensors} -> {live()}; {grown:+.0f} MB after {WARM}")
    assert ended["kept"] > ended["refused"]
    assert live() <= tensors + 10
    assert grown < MOST_MB
