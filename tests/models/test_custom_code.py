import io
import sys
from pathlib import Path

import pytest
import torch

from lit_prune.depth import Depth
from lit_prune.errors import InputError
from lit_prune.evaluation.sizes import parameters
from lit_prune.export.formats import HuggingFace
from lit_prune.export.verify import verify
from lit_prune.models.custom_code import runs_custom_code
from lit_prune.models.load import load_config, load_model, load_tokenizer, skeleton
from lit_prune.pipeline import prune
from lit_prune.pruning import Method
from lit_prune.recipe import Recipe
from lit_prune.recover import MaskedLoRA
from lit_prune.shrink import HeadGroups, MLPWidth
from tests.conftest import export, small_model
from tests.custom_code import write_custom_model

IDS = torch.arange(3, 35)[None]


@pytest.mark.parametrize("load", [load_config, load_model, load_tokenizer])
def test_code_that_is_not_trusted_is_neither_run_nor_asked_about(
    load: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_custom_model(tmp_path / "own")
    for file in tmp_path.glob("own/*.py"):
        file.write_text("raise SystemExit('this ran')")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(InputError) as refused:
        load(str(tmp_path / "own"))  # type: ignore[operator]
    assert str(refused.value).startswith("`model.trust_remote_code` must be true for ")
    files = ["configuration_own.py", "modeling_own.py", "tokenization_own.py"]
    assert all(str(tmp_path / "own" / name) in str(refused.value) for name in files)
    assert "Do you wish" not in capsys.readouterr().out
    assert sys.stdin.read() == "y\n"  # nobody asked


def test_a_class_in_another_repository_is_named_with_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "some/code--own.Own"}}')
    with pytest.raises(InputError, match=r"of its own \(some/code/own.py\): read that code first"):
        load_config(str(tmp_path))


def test_code_that_is_trusted_is_run_and_exported_with_the_model(tmp_path: Path) -> None:
    write_custom_model(tmp_path / "own")
    source = str(tmp_path / "own")
    model = load_model(source, trust_remote_code=True)
    assert runs_custom_code(model)
    assert not runs_custom_code(small_model())
    assert type(load_tokenizer(source, trust_remote_code=True)).__name__ == "OwnTokenizer"
    on_meta = skeleton(load_config(source, trust_remote_code=True), trust_remote_code=True)
    assert type(on_meta).__name__ == type(model).__name__ == "OwnForCausalLM"
    prune(model, [IDS], Recipe(sparsity=0.5))
    MaskedLoRA().attach(model)
    plan = export(model, tmp_path / "out")
    assert type(plan.plain).__name__ == "OwnForCausalLM"
    assert {"configuration_own.py", "modeling_own.py"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert verify(tmp_path / "out", plan, HuggingFace()).zeros_expected
    usage = HuggingFace().usage(plan.outline, "this/folder")
    assert 'AutoModelForCausalLM.from_pretrained("this/folder", trust_remote_code=True)' in usage
    assert 'AutoTokenizer.from_pretrained("this/folder", trust_remote_code=True)' in usage
    with pytest.raises(InputError, match="must be true for"):
        load_config(str(tmp_path / "out"))


@pytest.mark.parametrize("method", [MLPWidth(multiple=8), HeadGroups(), Depth()], ids=repr)
def test_a_config_that_has_its_fields_in_instances_alone_is_shrunk(method: Method, tmp_path: Path) -> None:
    write_custom_model(tmp_path / "own")
    model = load_model(str(tmp_path / "own"), trust_remote_code=True)
    full = parameters(model)
    prune(model, [IDS], Recipe(method, 0.5))
    assert parameters(model) < full
    plan = export(model, tmp_path / "out")
    verify(tmp_path / "out", plan, HuggingFace())
    opened = load_model(str(tmp_path / "out"), trust_remote_code=True)
    assert type(opened).__name__ == "OwnForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(opened(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
