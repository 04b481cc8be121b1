"""The examples, run as they stand on a little text."""

import json
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from lit_prune.callbacks.loggers import PICTURE, TABLE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as from_dense
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as to_dense
from transformers import AutoModelForCausalLM

from lit_prune.masks.zeros import zeros
from tests.conftest import small_model

FOLDER = Path(__file__).parent.parent / "examples"
SMALL = ["--data.windows=48", "--data.tokens=32", "--data.batch_size=2", "--trainer.max_steps=24"]


def docs(part: str) -> list[dict[str, str]]:
    words = ["items", "files", "names", "values", "errors", "threads", "modules", "numbers"]
    lines = [f"Remember the {part} {other} before you ask for more {word}." for word in words for other in words]
    return [{"name": part, "text": "\n".join(lines * 2)}]


def test_a_project_of_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("ignore")
    config = FOLDER / "own_project.yaml"
    assert "examples/own_project.py fit --config examples/own_project.yaml" in config.read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_prune.data.python_docs.python_docs", docs)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.val_check_interval=8", "--trainer.log_every_n_steps=4"]
    monkeypatch.setattr("sys.argv", ["own_project.py", "fit", f"--config={config}", *SMALL, *quiet])
    runpy.run_path(str(FOLDER / "own_project.py"), run_name="__main__")

    report = json.loads(Path("runs/own/report.json").read_text())
    assert report["cuts"][0]["step"] == 20
    opened = AutoModelForCausalLM.from_pretrained("runs/own/model", dtype=torch.float32)
    zero, total = zeros(weight for name, weight in opened.named_parameters() if "_proj" in name)
    assert zero / total == pytest.approx(0.5, abs=1e-3)
    assert list(Path("runs/own_checkpoints").glob("*.ckpt"))
    [events] = Path("runs/own_tensorboard").rglob("events.out.*")
    seen = EventAccumulator(str(events))
    seen.Reload()
    tags = seen.Tags()
    curves = {"train/loss", "val/perplexity", "pruning/sparsity", "pruning/block_0", "perplexity/recovered"}
    assert curves <= set(tags["scalars"])
    assert seen.Scalars("pruning/sparsity")[0].step == 20
    assert tags["images"] == [PICTURE]
    [text] = seen.Tensors(f"{TABLE}/text_summary")
    assert b"perplexity, recovered" in text.tensor_proto.string_val[0]


def test_two_of_four_weights_become_sparse_ones() -> None:
    example = runpy.run_path(str(FOLDER / "sparse24.py"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    model = small_model(**sizes, num_attention_heads=4, num_key_value_heads=1)  # keys and values have 16 rows
    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    for linear in linears.values():
        linear.weight.data.view(-1, 4)[:, 1:3] = 0
    model.model.layers[0].mlp.gate_proj.weight.data[0] = 1  # not 2:4
    before = {name: linear.weight for name, linear in linears.items()}
    stub = {"to_sparse_semi_structured": lambda weight: to_dense(*from_dense(weight.half())).float()}
    example["sparsify"].__globals__.update(stub)
    assert example["sparsify"](model) == 3
    changed = {name for name, linear in linears.items() if linear.weight is not before[name]}
    assert {name.rpartition(".")[2] for name in changed} == {"q_proj", "o_proj", "up_proj"}  # down_proj has 96 columns
    for name in changed:
        assert torch.equal(linears[name].weight, before[name].half().float())


def test_two_of_four_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    example = runpy.run_path(str(FOLDER / "sparse24.py"))
    assert example["is_two_of_four"](torch.tensor([[1, 0, 2, 0], [0, 0, 0, 3.0]]))
    assert not example["is_two_of_four"](torch.tensor([[1, 0, 2, 3.0]]))
    assert not example["is_two_of_four"](torch.zeros(2, 3))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="A CUDA GPU is needed"):
        example["main"]("any/folder")
