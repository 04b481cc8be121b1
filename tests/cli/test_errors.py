"""Messages of jsonargparse, in one line."""

from pathlib import Path

import pytest
from jsonargparse import Namespace

from lit_prune.cli.errors import with_options
from tests.cli.conftest import check_refused, run

MISTAKES = [
    (["--pruning.at_step=soon"], r"`pruning.at_step` must be a whole number or a list, got soon\.$"),
    (["--pruning.schedule=Qubic"], r"`pruning.schedule` must be one of Cubic, Linear, OneShot, .*Did you mean Cubic"),
    (["--pruning.before=MaskLoRA"], r"`pruning.before` must be one of FullFineTuning, .*Did you mean MaskedLoRA"),
    (["--pruning.budget=weights"], r"`pruning.budget` must be one of linears, parameters, bytes, got weights\.$"),
    (
        ["--pruning.method=Shrink", "--pruning.method.parts=[MLPWidht]"],
        r"`pruning.method.parts` must be one of Depth, Experts, .* MLPWidth, .*Did you mean MLPWidth",
    ),
    (["--pruning.budget=linear"], r"`pruning.budget` must be one of .*, got linear\. Did you mean linears\?$"),
    (
        ["--pruning.sparsity=50%"],
        r"`pruning.sparsity` must be a number or a list, got 50%\. \(a share is written 0.5\)",
    ),
    (["--pruning.targets=q_proj"], r"`pruning.targets` must be a list, got q_proj\. \(a list is written \[q_proj\]\)$"),
    (
        ["--pruning.method.pattern=2:4"],
        r"got '2:4'. \(2:4 is --pruning.method.pattern NofM --pruning.method.pattern.n 2 --pruning.method.pattern.m 4",
    ),
    (["--pruning.sparsty=0.5"], r"`--pruning.sparsty` is not an option. Did you mean --pruning.sparsity"),
    (
        ["--pruning.method=Wnda"],
        r"`pruning.method` must be one of ADMM, Depth, Experts, HeadGroups, HiddenWidth, MLPWidth, Magnitude, "
        r"Shrink, Slicing, SparseGPT, Wanda, or .*got 'Wnda'. Did you mean Wanda",
    ),
    (
        ["--pruning.allocation=DPL"],
        r"`pruning.allocation` must be one of AlphaPruning, Arithmetic, DLP, .*Did you mean DLP",
    ),
    (
        ["--pruning.recovery=Lora"],
        r"`pruning.recovery` must be one of FullFineTuning, LoRA, MaskedLoRA, .*Did you mean LoRA",
    ),
    (
        ["--pruning.reconstruction=Recon"],
        r"`pruning.reconstruction` must be one of Reconstruct, or .*got 'Recon'. Did you mean Reconstruct",
    ),
    (
        ["--pruning.distillation=Distil"],
        r"`pruning.distillation` must be one of Distillation, or .*got 'Distil'. Did you mean Distillation",
    ),
    (
        ["--pruning.method.parts=[MLPWidth]"],
        r"`pruning.method.parts` is not a setting of Wanda. .*of Shrink it is: --pruning.method Shrink",
    ),
    (
        ["--pruning.method=Shrink", "--pruning.method.parts=[MLPWidth,"],
        r"`pruning.method.parts` must be a list, got .MLPWidth,. \(put a list in quotes and brackets: '\[A, B\]'\)",
    ),
    (
        ["--pruning.method=Shrink", "--pruning.method.parts=a"],
        r"`pruning.method.parts` must be a list, got a. \(a list is written \[a\]\)",
    ),
    (
        ["--pruning.method=Shrink", "--pruning.method.multiple=8"],
        r"`pruning.method.multiple` is not a setting of Shrink. .*.parts '\[{class_path: Experts, init_args",
    ),
    (
        ["--pruning.method=Shrink", "--pruning.method.contiguous=true"],
        r"`pruning.method.contiguous` is not a setting of Shrink. .*.parts '\[{class_path: Depth, init_args: {",
    ),
    (
        ["--pruning.distillation.teacher=Copi"],
        r"`pruning.distillation.teacher` must be one of Copy, SparseDelta, TopK, .*Did you mean Copy",
    ),
    (
        ["--pruning.calibration.num_sample=8"],
        r"num_sample` is not an option. Did you mean --pruning.calibration.num_samples",
    ),
    (["--config=page.yaml"], r"`--config` must be a YAML file of settings: mapping values are not allowed"),
    (["--pruning.allocation.alfa=0.1"], r"`pruning.allocation.alfa` is not a setting of DLP. Did you mean alpha"),
    (["--pruning.reconstruction.batch=3"], r"not a setting of Reconstruct. \(epochs, lr, targets_from, weight_decay"),
    (["--format.outtype=q8_0", "--format=huggingface"], r"a setting of HuggingFace. \(of GGUF it is: --format GGUF\)"),
    (["--pruning.allocation.alpha=much"], r"`pruning.allocation.alpha` must be a number, got much\.$"),
    (["--pruning.allocation=Plan"], r"`pruning.allocation.path` must be given: Plan needs it"),
    (
        ["--pruning.allocation=Search", "--pruning.allocation.start=DPL"],
        r"`pruning.allocation.start` must be one of AlphaPruning, Arithmetic, DLP, .*Did you mean DLP",
    ),
    (
        ["--pruning.method.pattern=NofN"],
        r"`pruning.method.pattern` must be one of MixedNofM, NofM, Unstructured, .*got 'NofN'. Did you mean NofM",
    ),
    (
        ["--pruning.method.pattern=NofM", "--pruning.method.pattern.k=2"],
        r"`pruning.method.pattern.k` is not a setting of NofM. \(n, m\)",
    ),
    (
        ["--pruning.method.pattern=NofM", "--pruning.method.pattern.n=two"],
        r"`pruning.method.pattern.n` must be a whole number, got two\.$",
    ),
    (["--pruning.method.pattern.n=2"], r"`pruning.method.pattern` must be given along with its settings: one of Mix"),
    (["--config=none.yaml"], r"`--config` must be an existing file, got .*none.yaml"),
    (["--config=empty.yaml"], r"`--config` must be a YAML file of settings, got an empty one"),
    (
        ["--config=prunning.yaml"],
        r"`prunning.sparsity` is not a setting: there is no group `prunning`. Did you mean pruning",
    ),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(message, capsys, *args)


def test_a_misspelt_key_in_a_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("pruning:\n  sparsty: 0.5\n")
    with pytest.raises(SystemExit) as ended:
        run("fit", "--config=run.yaml")
    assert ended.value.code == 2
    assert "`pruning.sparsty` is not a setting. Did you mean pruning.sparsity" in capsys.readouterr().err


def test_a_field_is_named_by_its_option() -> None:
    start = Namespace(class_path="lit_prune.DLP", init_args=Namespace(alpha=0.1))
    search = Namespace(class_path="lit_prune.Search", init_args=Namespace(start=start, windows=2))
    lora, parts = Namespace(class_path="LoRA", init_args=Namespace(r=8)), [Namespace(class_path="MLPWidth")]
    pruning = Namespace(allocation=search, before=lora, recovery=lora, calibration=Namespace(seed=0))
    pruning.method = Namespace(class_path="Shrink", init_args=Namespace(parts=parts, weights=None))
    config = Namespace(pruning=pruning, model=Namespace(dtype="auto"), output="runs/x")
    for field, option in (
        ("Search.windows", "pruning.allocation.windows"),
        ("DLP.alpha", "pruning.allocation.start.alpha"),
        ("Shrink.parts", "pruning.method.parts"),
        ("calibration.seed", "pruning.calibration.seed"),
        ("LoRA.r", "LoRA.r"),  # at two options
        ("MLPWidth.multiple", "MLPWidth.multiple"),  # in a list
        ("calibration.text", "calibration.text"),  # no setting
        ("model.dtype", "model.dtype"),
        ("pruning.allocation", "pruning.allocation"),
        ("pruning.allocation.windows", "pruning.allocation.windows"),
    ):
        assert with_options(f"`{field}` must be 1, got 2: see `{field}`.", config) == (
            f"`{option}` must be 1, got 2: see `{option}`."
        )


OPTIONS = [
    (["--pruning.allocation.alpha=0.7"], r"`pruning.allocation.alpha` must be in"),
    (
        ["--pruning.allocation=Search", "--pruning.allocation.start=DLP", "--pruning.allocation.start.alpha=0.7"],
        r"`pruning.allocation.start.alpha` must be in",
    ),
    (["--pruning.recovery.r=0"], r"`pruning.recovery.r` must be"),
    (
        ["--pruning.method=MLPWidth", "--pruning.method.multiple=1000"],
        r"`pruning.method.multiple` must be less than 512",
    ),
    (
        ["--pruning.method=Shrink", "--pruning.method.parts=[HeadGroups]", "--pruning.method.weights=[1,2]"],
        r"`pruning.method.weights` must be 1 positive numbers",
    ),
]


@pytest.mark.parametrize(("args", "message"), OPTIONS, ids=lambda value: str(value)[:60])
def test_errors_of_a_class_name_its_options(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(message, capsys, *args)
