"""Options that would have no effect."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from lit_prune.cli.effects import check_effects, option_values
from lit_prune.errors import InputError

METHOD: Any = SimpleNamespace(class_path="lit_prune.pruning.Wanda")


@pytest.mark.parametrize(
    ("args", "method", "told"),
    [
        (["validate", "--pruning.sparsity=0.3"], METHOD, "`pruning.sparsity` must be left out for validate, which mea"),
        (["test", "--format", "gguf"], METHOD, "`format` must be left out for test"),
        (["evaluate", "--pruning.method", "MLPWidth"], METHOD, "`pruning.method` must be left out for evaluate"),
        (["prune", "--trainer.max_steps", "3"], METHOD, "`trainer.max_steps` must be left out for prune, which does n"),
        (
            ["score", "--pruning.recovery.r=3"],
            METHOD,
            "`pruning.recovery.r` must be left out for score, .*`lit-prune",
        ),
        (["prune", "--pruning.distillation.weight=1"], METHOD, "`pruning.distillation.weight` must be left out"),
        (
            ["fit", "--pruning.target_parameters", "3M"],
            None,
            "`pruning.target_parameters` must be left out without `p",
        ),
        (["fit", "--pruning.allocation=DLP"], None, "which is null, so that nothing is cut: add `--pruning.method MLP"),
    ],
)
def test_options_without_effect(args: Sequence[str], method: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_effects(args, args[0], method)


@pytest.mark.parametrize(
    ("args", "method"),
    [
        (["fit", "--pruning.target_parameters=3M", "--trainer.max_steps=3", "--format=gguf"], METHOD),
        (["fit", "--pruning.method=null", "--pruning.sparsity=null", "--pruning.recovery=LoRA"], None),
        (["fit", "--pruning.method", "null", "--pruning.allocation", "null"], None),
        (["prune", "--pruning.sparsity=0.5", "--pruning.recovery=null", "--format=packed"], METHOD),
        (["validate", "--config", "run.yaml", "--ckpt_path=last", "--output=x", "--data.val_windows=3"], METHOD),
        (["export", "--ckpt_path", "last", "--pruning.recovery=LoRA"], METHOD),
    ],
)
def test_options_with_an_effect(args: Sequence[str], method: Any) -> None:
    check_effects(args, args[0], method)


def test_values_of_options() -> None:
    args = ["fit", "--a=1", "-c", "x", "--b", "--c", "2", "--d"]
    assert option_values(args) == {"--a": "1", "-c": "x", "--b": "", "--c": "2", "--d": ""}
