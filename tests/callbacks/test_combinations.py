"""Every kind of cut with every recovery at every time: what makes no sense is refused in a line, the rest holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lit_prune.callbacks import DynamicPruningCallback, ResultsCallback
from lit_prune.callbacks.results import find_callback
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_prune.allocate import DLP, Uniform
from lit_prune.calibration.windows import Calibration
from lit_prune.depth import Depth
from lit_prune.errors import InputError
from lit_prune.models.families import find_blocks
from lit_prune.models.quantised import compute_exactly, is_quantised, mask
from lit_prune.pruning import NofM, Wanda
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, QLoRA, Recovery, adapter_config
from lit_prune.recover.merge import without_adapter
from lit_prune.shrink import MLPWidth
from lit_prune.slice import Slicing
from tests.callbacks.test_dynamic_pruning import QUIET, Foreign, loader
from tests.conftest import WIDE, small_model

SPARSITY = 0.5
CUTS: dict[str, dict[str, Any]] = {
    "masks": {"method": Wanda()},
    "2:4": {"method": Wanda(NofM(2, 4)), "allocation": Uniform()},
    "slices": {"method": Slicing()},
    "channels": {"method": MLPWidth(), "allocation": DLP()},
    "blocks": {"method": Depth()},
}
RECOVERIES: dict[str, Recovery | None] = {
    "none": None,
    "LoRA": LoRA(),
    "MaskedLoRA": MaskedLoRA(),
    "QLoRA": QLoRA(),
    "QLoRA merged": QLoRA(form="merged"),
    "QLoRA requantised": QLoRA(form="requantised", quantization="int8"),
    "full": FullFineTuning(),
}
TIMES: dict[str, Any] = {"step 0": 0, "later": 1, "gradual": [0, 1]}

FILLS = "`pruning.recovery` must be given if pruned weights are trained, .*use MaskedLoRA, FullFineTuning or LoRA"
FOLDS = "`pruning.recovery` must keep zeros when its adapter is merged, .* 2 cuts of masks, got LoRA.*, or make one"
FULL = "`pruning.recovery` must leave the weights in full precision .* a cut comes after it, got QLoRA.*use MaskedLoRA"
ONCE = (
    "`pruning.at_step` must be one step for .*, which cannot prune a model twice, .*: give one, or (a|another) method"
)
WIDTHS = "`QLoRA.form` must be merged after Slicing, or `quantization` int8, got adapter in nf4"
QLORAS = ("QLoRA", "QLoRA merged", "QLoRA requantised")
REFUSED: dict[tuple[str, str, str], str] = {
    **{(cut, name, "gradual"): ONCE for cut in ("2:4", "slices") for name in RECOVERIES},
    **{("slices", "QLoRA", time): WIDTHS for time in ("step 0", "later")},
    **{(cut, "none", time): FILLS for cut in ("masks", "2:4") for time in ("step 0", "later")},
    ("masks", "none", "gradual"): FILLS,
    ("masks", "LoRA", "gradual"): FOLDS,
    **{(cut, name, "gradual"): FULL for cut in ("masks", "channels") for name in QLORAS},
}
SOME_OF_BLOCKS = (("LoRA", "gradual"), ("QLoRA", "later"), ("full", "step 0"))  # the rest is as for channels
TABLE = [
    (cut, name, time)
    for cut in CUTS
    for name in RECOVERIES
    for time in TIMES
    if cut != "blocks" or (name, time) in SOME_OF_BLOCKS
]


class Tiny(Foreign):
    """Two blocks, of sizes that 4 bits can have."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model(num_hidden_layers=2, **WIDE)


class Gone(Callback):
    """Keeps what was zero right after the last cut, before anything is trained on it."""

    def __init__(self) -> None:
        self.zero: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        pruning = find_callback(trainer, DynamicPruningCallback)
        if pruning.run.done and pruning.run.done[-1].step == trainer.global_step:
            self.zero = pruned(pl_module.model)


def pruned(model: PreTrainedModel) -> dict[str, Tensor]:
    """Where the linears of the blocks are pruned: by their masks while these are kept, else where they are zero."""
    blocks = find_blocks(without_adapter(model), quantised=True)
    linears = {f"{block.path}.{name}": linear for block in blocks for name, linear in block.linears.items()}
    masks = {name: mask(linear.module) for name, linear in linears.items()}
    return {name: ~kept if (kept := masks[name]) is not None else linears[name].weight_OI == 0 for name in linears}


def run(cut: str, recovery: str, time: str, folder: Path) -> tuple[Tiny, Gone]:
    pruning = DynamicPruningCallback(
        **{**CUTS[cut], "recovery": RECOVERIES[recovery], "at_step": TIMES[time], "sparsity": SPARSITY},
        calibration=Calibration(num_samples=4, seq_length=16),
        measure=False,
    )
    module, gone = Tiny(), Gone()
    callbacks = [ResultsCallback(str(folder)), pruning, gone]
    Trainer(**QUIET, max_steps=3, enable_checkpointing=False, callbacks=callbacks).fit(module, loader(rows=12))
    return module, gone


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_prune.report.write.save_figure", lambda path, *_: path.write_bytes(b""))


@pytest.mark.parametrize(("cut", "recovery", "time"), [case for case in TABLE if case in REFUSED])
def test_it_is_refused_in_a_line(cut: str, recovery: str, time: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=REFUSED[cut, recovery, time]) as told:
        run(cut, recovery, time, tmp_path / "run")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("cut", "recovery", "time"), [case for case in TABLE if case not in REFUSED])
def test_it_runs_and_keeps_its_promises(cut: str, recovery: str, time: str, tmp_path: Path) -> None:
    module, gone = run(cut, recovery, time, tmp_path / "run")
    model, report = module.model.eval(), json.loads((tmp_path / "run" / "report.json").read_text())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    compute_exactly(opened)
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        found, expected = opened(ids).logits, model(ids).logits
    far = 0.2 if recovery == "QLoRA requantised" else 1e-4  # rounded once more
    assert (found - expected).abs().max() <= far * expected.abs().max()
    merged = {"none": False, "full": False, "LoRA": cut in ("slices", "channels", "blocks"), "QLoRA": False}.get(
        recovery, True
    )
    beside = adapter_config(opened) is not None
    assert report["merged"] is report["export"]["verified"] is True if merged else report["merged"] is False
    assert beside is (recovery in ("LoRA", "QLoRA") and not merged)
    packed = any(is_quantised(module) for module in opened.modules())
    assert packed is (recovery in ("QLoRA", "QLoRA requantised"))
    if cut == "slices":
        assert opened.config.slice_sizes == report["slice"]["sizes"] + [report["slice"]["head_size"]]
        assert report["slice"]["achieved"] == pytest.approx(SPARSITY, abs=0.1)
        return
    if cut == "blocks":
        assert opened.config.num_hidden_layers == len(report["depth"]["remaining"]) == 1
        assert report["depth"]["achieved"] == SPARSITY
        return
    if cut == "channels":
        assert [layer.mlp.down_proj.in_features for layer in opened.model.layers] == report["mlp_width"]["units"]
        assert report["mlp_width"]["achieved"] == SPARSITY
        return
    assert_zeros(cut, gone.zero, pruned(opened), rounds=packed)
    assert report["sparsity"]["achieved_linears"] == pytest.approx(SPARSITY, abs=1e-3)


def assert_zeros(cut: str, gone: dict[str, Tensor], after: dict[str, Tensor], *, rounds: bool) -> None:
    """Asserts that the zeros of the last cut are in the folder, in the requested pattern."""
    assert gone.keys() == after.keys()
    for name, zero in gone.items():
        assert after[name][zero].all(), name
        assert rounds or (after[name] & ~zero).sum() <= 1, name
        if cut == "2:4":
            assert (after[name].unflatten(1, (-1, 4)).sum(-1) >= 2).all()
    share = sum(int(zero.sum()) for zero in gone.values()) / sum(zero.numel() for zero in gone.values())
    assert share == pytest.approx(SPARSITY, abs=1e-2)


def test_qlora_before_the_cut_is_refused(tmp_path: Path) -> None:
    told = "`pruning.before` must leave the weights in full precision if a cut comes after it, got QLoRA"
    with pytest.raises(InputError, match=told):
        DynamicPruningCallback(Wanda(), at_step=1, before=QLoRA(), recovery=LoRA())
