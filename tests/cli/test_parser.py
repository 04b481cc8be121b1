"""The arguments, their defaults, and the configuration that a run writes."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse._parameter_resolvers import get_signature_parameters

from lit_prune.allocate import Allocation
from lit_prune.cli.main import main
from lit_prune.distill import Teacher
from lit_prune.export.formats import ExportFormat
from lit_prune.pruning import Method, Pattern, SparseGPT
from lit_prune.recover import Recovery
from tests.cli.conftest import report, run


def test_the_written_configuration_gives_the_same_run_again() -> None:
    run("fit", "--output=runs/x")
    main(["fit", "--config=runs/x/config.yaml", "--output=runs/y"])
    main(["score", "--config=runs/x/config.yaml", "--output=runs/z"])
    first, second = report(), report("runs/y")
    assert first["perplexity"] == pytest.approx(second["perplexity"])
    assert first["cuts"][0]["rates"] == second["cuts"][0]["rates"]


def test_a_method_that_replaces_the_default_one_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--pruning.method", "SparseGPT", "--print_config"])
    method = yaml.safe_load(capsys.readouterr().out)["pruning"]["method"]
    assert method["class_path"] == "lit_prune.SparseGPT"
    assert SparseGPT(**method["init_args"]).propagate == "pruned"


def test_print_config_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["pruning"]["method"]["class_path"] == "lit_prune.Wanda"
    assert config["pruning"]["allocation"] is None  # it depends on the method
    assert config["pruning"]["recovery"]["class_path"] == "lit_prune.MaskedLoRA"
    assert config["pruning"]["calibration"]["num_samples"] == 128
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--pruning.sparsity", "--data.train_files", "--model.pretrained", "--output", "--overwrite"):
        assert option in printed
    assert "Checkpoint to resume from; `last`" in printed
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "on the test text; writes nothing" in " ".join(capsys.readouterr().out.split())


def test_the_command_line_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert sorted(config) == sorted(
        [
            "checkpoint_every",
            "ckpt_path",
            "data",
            "export",
            "format",
            "lm_eval",
            "model",
            "output",
            "overwrite",
            "pruning",
            "push_to_hub",
            "seed_everything",
            "tasks",
            "trainer",
            "weights_only",
        ]
    )
    assert sorted(config["pruning"]) == sorted(
        [
            "allocation",
            "at_step",
            "before",
            "blocks",
            "budget",
            "calibration",
            "distillation",
            "full_checkpoint",
            "ignore",
            "keep_zeros",
            "max_rate",
            "measure",
            "method",
            "min_rate",
            "reconstruction",
            "recovery",
            "schedule",
            "sparsity",
            "statistics",
            "target",
            "target_bytes",
            "target_parameters",
            "target_perplexity",
            "targets",
        ]
    )


def test_a_callback_with_an_enum_as_default_is_written_to_the_configuration() -> None:
    Path("timer.yaml").write_text(
        "trainer:\n  callbacks:\n  - class_path: Timer\n    init_args:\n      duration: 00:01:00:00\n"
    )
    run("prune", "--config=timer.yaml", "--output=runs/x")
    (timer,) = yaml.safe_load(Path("runs/x/config.yaml").read_text())["trainer"]["callbacks"]
    assert timer["init_args"]["interval"] == "step"
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config=runs/x/config.yaml", "--print_config"])
    assert ended.value.code == 0


def test_short_names_of_every_room_are_known() -> None:
    program = (
        "import lit_prune.cli.parser\n"
        "from lit_prune.pruning.base import Method\n"
        "print(*sorted(kind.__name__ for kind in Method.__subclasses__()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Slicing" in done.stdout.split()


@pytest.mark.parametrize("base", [Allocation, ExportFormat, Method, Pattern, Recovery, Teacher])
def test_the_type_of_every_option_of_a_class_is_known(base: type) -> None:
    kinds = [kind for kind in concrete(base) if kind.__module__.startswith("lit_prune.")]
    assert kinds
    for kind in kinds:
        for parameter in get_signature_parameters(kind, None):
            assert not isinstance(parameter.annotation, str), f"{kind.__name__}.{parameter.name} would not be checked"


def concrete(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    return [child for child in children if not inspect.isabstract(child)] + [
        leaf for child in children for leaf in concrete(child)
    ]
