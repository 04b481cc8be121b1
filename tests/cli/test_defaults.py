"""Defaults that depend on the model or on the run."""

import pydoc
from pathlib import Path

import pytest
from jsonargparse import Namespace

from lit_prune.allocate import DLP, Uniform
from lit_prune.cli.defaults import (
    allocation_arguments,
    check_allocation_named,
    default_allocation,
    export_arguments,
    fill_lengths,
    find_checkpoint,
    option_values,
    settings_last,
    spell_format,
)
from lit_prune.errors import InputError


@pytest.mark.parametrize(
    ("args", "ordered"),
    [
        (["fit", "--p.a.b", "1", "--c=2", "--p.a", "X"], ["fit", "--c=2", "--p.a", "X", "--p.a.b", "1"]),
        (["fit", "--p.a.b.c=1", "--p.a.b=Y", "--p.a=X"], ["fit", "--p.a=X", "--p.a.b=Y", "--p.a.b.c=1"]),
        (["fit", "--p.a=X", "--p.a.b=1", "--p.a=Y"], ["fit", "--p.a=X", "--p.a.b=1", "--p.a=Y"]),  # replaces the first
        (["fit", "--p.a.b=1", "--p.ab=3", "--p.a=X"], ["fit", "--p.ab=3", "--p.a=X", "--p.a.b=1"]),
        (
            ["fit", "--format.b=1", "--config", "f", "--format=X"],
            ["fit", "--config", "f", "--format=X", "--format.b=1"],
        ),
        (["fit", "--format.b", "1", "-c", "f", "--format=X"], ["fit", "-c", "f", "--format=X", "--format.b", "1"]),
        (["fit", "--model.b=1", "--model=f.yaml"], ["fit", "--model.b=1", "--model=f.yaml"]),  # a group
        (["fit", "--b", "1", "2", "--p.a", "-3M"], ["fit", "--b", "1", "2", "--p.a", "-3M"]),
        (["fit"], ["fit"]),
    ],
)
def test_settings_come_after_their_class(args: list[str], ordered: list[str]) -> None:
    assert settings_last(args) == ordered


def test_a_length_that_is_left_open_is_what_the_model_takes() -> None:
    def filled(**model: object) -> tuple[int, int]:
        fields = {"pretrained": "embedded", "architecture": None, "trust_remote_code": False} | model
        config = Namespace(model=Namespace(**fields), data=Namespace(seq_length=None))
        config["pruning.calibration.seq_length"] = None
        fill_lengths(config)
        return config.data.seq_length, config.pruning.calibration.seq_length

    assert filled() == (512, 512)
    long = {"model_type": "llama", "max_position_embeddings": 4096}
    assert filled(architecture=long) == (1024, 2048)
    given = Namespace(data=Namespace(seq_length=4096), pruning=Namespace(calibration=Namespace(seq_length=8)))
    fill_lengths(given)
    assert (given.data.seq_length, given.pruning.calibration.seq_length) == (4096, 8)


def test_an_export_has_the_settings_of_the_run_that_its_checkpoint_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("runs/usual", "runs/x"):
        Path(run).mkdir(parents=True)
        Path(run, "config.yaml").touch()
    Path("config.yaml").touch()  # of nothing that is exported
    for args, first in (
        (["--ckpt_path", "last"], ["--config=runs/usual/config.yaml", "--output=runs/usual"]),
        (["--ckpt_path=last", "--output=runs/x"], ["--config=runs/x/config.yaml", "--output=runs/x"]),
        (["--ckpt_path=runs/x/checkpoints/last.ckpt"], ["--config=runs/x/config.yaml"]),
        (["--ckpt_path=last", "--config=other.yaml"], []),
        (["--ckpt_path=last", "--output=runs/none"], []),
    ):
        assert export_arguments(["export", *args], "runs/usual") == ["export", *first, *args]
    assert export_arguments(["fit", "--ckpt_path=last"], "runs/usual") == ["fit", "--ckpt_path=last"]


def test_the_checkpoint_to_resume_from(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match="`ckpt_path` must be an existing checkpoint, or last, got .*last.ckpt"):
        find_checkpoint("last", tmp_path)
    last.parent.mkdir()
    last.touch()
    assert find_checkpoint("last", tmp_path) == find_checkpoint(str(last), Path("elsewhere")) == str(last)


def test_settings_of_an_allocation_without_its_name_are_those_of_dlp() -> None:
    alpha = ["--config=x.yaml", "--pruning.allocation.alpha", "0.1"]
    assert allocation_arguments(["fit", *alpha]) == ["fit", "--pruning.allocation=DLP", *alpha]
    for args in (["fit", "--pruning.allocation=OWL"], ["fit"], []):
        assert allocation_arguments(args) == args


def test_settings_of_an_allocation_without_its_name_where_the_default_is_another(tmp_path: Path) -> None:
    alpha, width = ["prune", "--pruning.allocation.alpha=0.1"], Namespace(class_path="lit_prune.MLPWidth")
    config, named, other = tmp_path / "x.yaml", tmp_path / "named.yaml", tmp_path / "other.yaml"
    other.write_text("model: {pretrained: x}")
    config.write_text("pruning: {sparsity: 0.3}")
    named.write_text("pruning: {allocation: OWL}")
    for args in (alpha, [*alpha, f"--config={config}"], [*alpha, "-c", str(other)]):
        with pytest.raises(InputError, match=r"be named for `pruning.allocation.alpha`: the default for MLPWidth is U"):
            check_allocation_named(args, width)
    check_allocation_named(alpha, Namespace(class_path="lit_prune.Wanda"))
    check_allocation_named([*alpha, "--pruning.allocation=OWL"], width)
    check_allocation_named([*alpha, f"--config={named}", "-c", str(config)], width)
    check_allocation_named(["prune"], width)


def test_the_default_allocation_is_that_of_the_class_of_the_method() -> None:
    for method, allocation in {
        "lit_prune.Wanda": DLP,
        "lit_prune.slice.Slicing": DLP,
        "lit_prune.Depth": Uniform,
    }.items():
        path = default_allocation(Namespace(class_path=method))
        assert pydoc.locate(path) is allocation


def test_a_format_is_named_in_any_case() -> None:
    assert spell_format(["fit", "--format=gguf", "--output=gguf"]) == ["fit", "--format=GGUF", "--output=gguf"]
    assert spell_format(["prune", "--format.help", "gguf"]) == ["prune", "--format.help", "GGUF"]
    assert spell_format(["fit", "--format", "huggingface", "gguf"]) == ["fit", "--format", "HuggingFace", "gguf"]
    assert spell_format(["fit", "--format", "mine.Format"]) == ["fit", "--format", "mine.Format"]
    assert spell_format(["fit", "--format"]) == ["fit", "--format"]


def test_an_export_of_a_model_does_not_cut(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`pruning.sparsity` must be left out for export, .* by `lit-prune prune`"):
        export_arguments(["export", "--model.pretrained=x", "--pruning.sparsity=0.5"], "runs/usual")
    config = tmp_path / "run.yaml"
    config.write_text("pruning: {sparsity: 0.5}")
    with pytest.raises(InputError, match=r"`model.pretrained` must be given: .*run.yaml has a cut"):
        export_arguments(["export", f"--config={config}"], "runs/usual")
    for null in ("null", "~", "NULL"):
        args = ["export", "--model.pretrained=x", f"--pruning.method={null}"]
        assert export_arguments(args, "runs/usual") == args
    for more in ("--model.pretrained=x", "--ckpt_path=y"):
        args = ["export", f"--config={config}", more]
        assert export_arguments(args, "runs/usual") == args
    for text in ("pruning: {method: null}", "model: {pretrained: x}", "pruning: [", ""):
        config.write_text(text)
        assert export_arguments(["export", "-c", str(config)], "runs/usual") == ["export", "-c", str(config)]


def test_an_export_needs_a_model() -> None:
    for given in ("--ckpt_path=x", "--model.pretrained=x", "--config=x", "--help"):
        assert export_arguments(["export", given], "runs/usual") == ["export", given]
    with pytest.raises(InputError, match="`model.pretrained` or `ckpt_path` must be given"):
        export_arguments(["export", "--output=x"], "runs/usual")


def test_values_of_options() -> None:
    args = ["fit", "--a=1", "-c", "x", "--b", "--c", "2", "--d"]
    assert option_values(args) == {"--a": "1", "-c": "x", "--b": "", "--c": "2", "--d": ""}
