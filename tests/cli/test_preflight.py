"""Settings that are refused before any work, each in one line."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from lit_prune.checkpointing.record import RunRecord
from lit_prune.cli.preflight import check_effects, check_settings
from lit_prune.errors import InputError
from tests.cli.conftest import check_refused, run

MISTAKES = [
    (["--push_to_hub=me/model"], r"`push_to_hub` must be left out while HF_HUB_OFFLINE is set"),
    (["--push_to_hub=a b"], r"`push_to_hub` must be the id of a repository, such as name/model, got 'a b'"),
    (
        ["--pruning.recovery=null"],
        r"`pruning.recovery` must be given .*: use MaskedLoRA, FullFineTuning or LoRA, freeze",
    ),
    (["--pruning.at_step=[2,1]"], r"`pruning.at_step` must list rising steps, got \[2, 1\]"),
    (["--pruning.at_step=2"], r"`pruning.at_step` must be below the number of optimizer steps, 2 .*, got 2"),
    (
        ["--pruning.at_step=[0,1]", "--pruning.recovery=LoRA"],
        r"`pruning.recovery` must keep zeros .*, got LoRA\(r=8.*: use MaskedLoRA",
    ),
    (["--pruning.before=LoRA"], r"`pruning.before` must be null if the first cut comes at step 0"),
    (["--checkpoint_every=0"], r"`checkpoint_every` must be at least 1"),
    (["--pruning.sparsity=1.2"], r"`pruning.sparsity` must be in \[0, 1\).*got 1.2"),
    (["--pruning.budget=parameters", "--pruning.sparsity=0.9"], r"must be between 0 and 0.7\d* of all parameters"),
    (["--pruning.sparsity=0.8", "--pruning.max_rate=0.7"], r"`pruning.sparsity` must be between 0 and 0.7"),
    (["--pruning.allocation.alpha=0.7"], r"`pruning.allocation.alpha` must be in \[0, 0.5\], got 0.7"),
    (
        ["--pruning.allocation=Plan", "--pruning.allocation.path=none.yaml"],
        r"`pruning.allocation.path` must be a file, got none.yaml",
    ),
    (
        ["--pruning.allocation=Search", "--pruning.allocation.evaluations=5"],
        r"`pruning.allocation.evaluations` must be at least 26",
    ),
    (
        ["--pruning.allocation=Search", "--pruning.allocation.windows=1000"],
        r"`pruning.allocation.windows` must be at most 30 with 400 evaluations, got 1000: ",
    ),
    (
        ["--pruning.allocation=Search", "--pruning.allocation.windows=5"],
        r"`pruning.allocation.windows` must be at most `pruning.calibration.num_samples`, 4, got 5",
    ),
    (
        ["--pruning.allocation=Search", "--pruning.allocation.state=none/state.json"],
        r"`pruning.allocation.state` must be a file in a folder that exists, got none/state.json",
    ),
    (["--pruning.method.pattern=NofM"], r"`pruning.allocation` must be Uniform for the pattern NofM, .*MixedNofM"),
    (
        ["--pruning.method.pattern=NofM", "--pruning.allocation=Uniform", "--pruning.sparsity=0.75"],
        r"`pruning.sparsity` must be 0.5 of the linears .*`--pruning.method.pattern.n 1`",
    ),
    (
        ["--pruning.method.pattern=NofM", "--pruning.method.pattern.n=5"],
        r"`pruning.method.pattern.n` must be between 1 and m, 4, .*got 5",
    ),
    (
        ["--pruning.method.pattern=MixedNofM", "--pruning.method.pattern.m=5"],
        r"`pruning.method.pattern.m` must divide .*got 5: self_attn.q_proj of block 0 has 192",
    ),
    (
        ["--pruning.method=SparseGPT", "--pruning.method.pattern=NofM", "--pruning.method.pattern.m=6"],
        r"`pruning.method.span` must be a multiple of 6, .*got 128; pass `--pruning.method.span 126`",
    ),
    (
        ["--pruning.calibration.num_samples=100000"],
        r"`pruning.calibration.num_samples` must be at most \d+, .*got 100000",
    ),
    (
        ["--pruning.calibration.seq_length=1024"],
        r"`pruning.calibration.seq_length` must be at most 512, the model's limit",
    ),
    (["--data.seq_length=513"], r"`data.seq_length` must be at most 512, the model's limit, got 513"),
    (["--data.train_files=none.txt"], r"`data.train_files` must name files that are there, got none.txt"),
    (["--data.val_files=null"], r"`data.val_files` must be given"),
    (["--model.pretrained=./none"], r"`model.pretrained` must exist, got './none': no such file or folder"),
    (["--model.pretrained=nobody/nothing"], r"`model.pretrained`: .*pass a local folder"),
    (
        ["--pruning.statistics=runs/none"],
        r"`pruning.statistics` must be a file that exists, runs/none does not; `lit-prune score`",
    ),
    (["--pruning.targets=[qproj]"], r"`pruning.targets` must match a linear, got 'qproj'"),
    (["--pruning.blocks=model.leyers"], r"`pruning.blocks` must be a path in the model, got 'model.leyers'"),
    (["--ckpt_path=last"], r"`ckpt_path` must be an existing checkpoint, or last, got runs/x/checkpoints/last.ckpt"),
    (["--output=train.txt"], r"`output` must be a folder, got the file train.txt"),
    (["--output=/proc/run"], r"`output` must be in a folder that can be written"),
    (["--model.pretrained=embeded"], r"there is no model 'embeded' here. Did you mean embedded"),
    (["--trainer.accelerator=tpu"], r"`trainer.accelerator` must be auto, or one that this machine has \(cpu.*got tpu"),
    (["--trainer.accelerator=gpo"], r"`trainer.accelerator` must be auto, or one .*got gpo"),
    (
        ["--trainer.barebones=true"],
        r"`trainer.barebones` must be false: it switches off the logging and the checkpoint",
    ),
    (["--trainer.max_steps=-1"], r"`trainer.max_steps` or `trainer.max_epochs` must be given"),
    (
        ["--trainer.max_steps=-1", "--trainer.max_epochs=-1"],
        r"`trainer.max_steps` or `trainer.max_epochs` must be given",
    ),
    (
        ["--pruning.recovery.target_modules=[qproj]"],
        r"`pruning.recovery.target_modules` must match linears of the model, got 'qproj'",
    ),
    (["--trainer.overfit_batches=2"], r"`trainer.overfit_batches` must be 0 with TextDataModule, got 2"),
    (
        ["--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.val_check_interval=100000"],
        r"`trainer.val_check_interval` must be at most the number of batches of an epoch, got 100000",
    ),
    (["--trainer.max_steps=-5"], r"`trainer.max_steps` must be at least 1, or -1 .*, got -5"),
    (["--trainer.max_steps=0"], r"`trainer.max_steps` must be at least 1, .*, got 0; `lit-prune prune` prunes"),
    (
        ["--model.architecture={'model_type': 'llama'}", "--pruning.method=null", "--pruning.recovery=QLoRA"],
        r"`pruning.recovery` must be null if `model.architecture` starts from random weights",
    ),
    (["--pruning.ignore=['(']"], r"`pruning.ignore` must be suffixes or regular expressions"),
    (
        [
            '--trainer.callbacks=[{"class_path": "lit_prune.callbacks.DynamicPruningCallback",'
            ' "init_args": {"method": null}}]'
        ],
        r"`trainer.callbacks` must not hold a DynamicPruningCallback",
    ),
    (
        ['--trainer.callbacks=[{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}]'],
        r"`EarlyStopping.monitor` must be one of train/loss, val/perplexity, got 'val_loss'",
    ),
    (["--trainer.callbacks=EMAWeightAveraging"], r"`trainer.callbacks` must not hold EMAWeightAveraging"),
    (["--trainer.callbacks=BackboneFinetuning"], r"`trainer.callbacks` must not hold BackboneFinetuning"),
    (["--trainer.logger=WandbLogger"], r"`WandbLogger` needs a package that is not installed: pip install 'wandb"),
    (["--trainer.precision=transformer-engine"], r"`trainer.precision` must not be transformer-engine"),
    (["--trainer.limit_val_batches=0.001"], r"`trainer.limit_val_batches`"),
    (["--model.attn_implementation=flash_attention_2"], r"`model.attn_implementation` must be one that runs here"),
    (["--format=gguf", "--pruning.method=Slicing", "--pruning.recovery=LoRA"], r"`format` GGUF"),
    (["--pruning.max_rate=1.5"], r"`pruning.max_rate` must be"),
    (
        ["--pruning.reconstruction=Reconstruct", "--pruning.reconstruction.state=none/state"],
        r"`pruning.reconstruction.state` must be in a folder that exists, got none/state",
    ),
    (
        ["--pruning.reconstruction=Reconstruct", "--pruning.reconstruction.state=."],
        r"`pruning.reconstruction.state` must be a folder that a reconstruction wrote",
    ),
    (
        ["--pruning.method=Depth", "--pruning.sparsity=0.01"],
        r"`pruning.sparsity` must remove something, got 0.01, which Depth rounds to nothing",
    ),
    (
        ["--pruning.reconstruction=Reconstruct", "--pruning.calibration.batch_size=4"],
        r"`pruning.reconstruction` must have at least two calibration batches",
    ),
    (
        ["--pruning.reconstruction=Reconstruct", "--pruning.reconstruction.epochs=0"],
        r"`pruning.reconstruction.epochs` must be at least 1, got 0; to cut without it leave",
    ),
    (
        ["--pruning.reconstruction=Reconstruct", "--pruning.calibration.num_samples=0"],
        r"`pruning.calibration.num_samples` must be at least 1, got 0",
    ),
    (
        ["--pruning.reconstruction=Reconstruct", "--pruning.ignore=['.*']"],
        r"`pruning.targets` and `pruning.ignore` leave nothing to prune in block 0",
    ),
    (
        ["--pruning.reconstruction=Reconstruct", "--pruning.method=Depth"],
        r"`pruning.reconstruction` must be null for Depth: leave it out, or choose a mask method, MLPWidth",
    ),
    (["--data.val_files=train.txt"], r"`data.val_files`"),
]
OTHER_VERBS = [
    ("prune", ["--pruning.method=null"], r"`pruning.method` must be given"),
    ("prune", ["--tasks=arc_easy", "--model.on_disk=true", "--model.dtype=auto"], r"`tasks` must be left out with"),
    ("prune", ["--pruning.max_rate=0.4"], r"`pruning.sparsity` must be between 0 and 0.4"),
    ("prune", ["--format=gguf", "--pruning.method=Slicing"], r"`format` GGUF"),
    ("score", ["--pruning.method=null"], r"`pruning.method` must be given"),
    ("score", ["--push_to_hub=me/model"], r"`push_to_hub` must be left out for score, which writes no model"),
    ("score", ["--pruning.allocation.alpha=0.7"], r"`pruning.allocation.alpha` must be in"),
    ("evaluate", [], r"`tasks` must be given, such as"),
    ("validate", ["--ckpt_path=none.ckpt"], r"`ckpt_path` must be an existing checkpoint"),
    ("export", [], r"`model.pretrained` or `ckpt_path` must be given"),
    ("export", ["--model.pretrained=embedded", "--model.on_disk=true"], r"`model.on_disk` must be false for export"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(message, capsys, *args)


@pytest.mark.parametrize(("verb", "args", "message"), OTHER_VERBS, ids=lambda value: str(value)[:60])
def test_a_mistake_of_another_verb(
    verb: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(message, capsys, *args, verb=verb)


def test_what_settings_tell_is_refused_before_weights_and_text_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint: dict[str, Any] = {"global_step": 1}
    RunRecord(settings={"pruning.sparsity": 0.5, "data.seed": 7}).write_to(checkpoint)
    torch.save(checkpoint, "run.ckpt")
    monkeypatch.setattr("lit_prune.fit.module.load_model", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr("lit_prune.data.datamodule.TextDataModule.stream", lambda *_: pytest.fail("text was read"))
    for args, message in (
        (["--pruning.at_step=2"], "`pruning.at_step` must be below"),
        (["--pruning.recovery.target_modules=[qproj]"], "`pruning.recovery.target_modules` must match linears"),
        (["--pruning.targets=[qproj]"], "`pruning.targets` must match a linear"),
        (["--ckpt_path=run.ckpt"], "`data.seed` must be what the checkpoint was made with, 7, got 0"),
    ):
        with pytest.raises(SystemExit):
            run("fit", "--output=runs/x", *args)
        assert message in capsys.readouterr().err


def test_an_output_that_exists_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/mine").write_text("x")
    for verb in ("fit", "prune", "score"):
        with pytest.raises(SystemExit) as ended:
            run(verb, "--output=runs/x")
        assert ended.value.code == 2
        assert "`--overwrite`" in capsys.readouterr().err
    assert [path.name for path in Path("runs/x").iterdir()] == ["mine"]


def test_on_disk_is_refused_where_it_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, args, told in (
        ("fit", ["--model.dtype=auto"], "`model.on_disk` must be false for fit, which keeps all weights in memory"),
        ("prune", [], "`model.dtype` must be bfloat16 with `model.on_disk`"),
        ("prune", ["--model.dtype=auto", "--trainer.precision=bf16-true"], "`trainer.precision` must be 32-true with"),
        ("prune", ["--model.architecture={'model_type': 'llama'}"], "`model.on_disk` must be false with `model.arch"),
    ):
        with pytest.raises(SystemExit):
            run(verb, "--output=runs/x", "--model.on_disk=true", *args)
        assert told in (message := capsys.readouterr().err)
        assert len(message.strip().splitlines()) == 1
        assert not Path("runs").exists()


@pytest.mark.parametrize("end", [{"max_time": "00:00:01:00"}, {"fast_dev_run": True}, {"max_epochs": 1}])
def test_what_ends_a_training_without_a_number_of_steps(end: dict[str, Any]) -> None:
    unset = {"max_steps": -1, "max_epochs": None, "max_time": None, "fast_dev_run": False}
    others = {"callbacks": None, "barebones": False, "accelerator": "auto", "precision": None}
    check_settings(Namespace(trainer=Namespace(**{**unset, **others, **end}), push_to_hub=None), "fit")


METHOD: Any = SimpleNamespace(class_path="lit_prune.pruning.Wanda")


@pytest.mark.parametrize(
    ("args", "method", "told"),
    [
        (["validate", "--pruning.sparsity=0.3"], METHOD, "`pruning.sparsity` must be left out for validate, which mea"),
        (["test", "--format", "gguf"], METHOD, "`format` must be left out for test"),
        (["evaluate", "--pruning.method", "MLPWidth"], METHOD, "`pruning.method` must be left out for evaluate"),
        (["prune", "--pruning.before", "LoRA"], METHOD, "`pruning.before` must be left out for prune, which does not"),
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
        (["score", "--format", "gguf"], METHOD, "`format` must be left out for score, which writes no model"),
        (["score", "--export.dtype=float16"], METHOD, "`export.dtype` must be left out for score"),
        (["score", "--pruning.reconstruction", "Reconstruct"], METHOD, "`pruning.reconstruction` must be left out for"),
        (["validate", "--pruning.targets=[q_proj]"], METHOD, "`pruning.targets` must be left out for validate"),
        (["fit", "--pruning.ignore=[q_proj]"], None, "`pruning.ignore` must be left out without `pruning.method`"),
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
        (["fit", "--pruning.method", "~", "--pruning.sparsity=NULL"], None),
        (["validate", "--pruning.recovery=~", "--pruning.sparsity", "Null"], METHOD),
        (["prune", "--pruning.at_step=3", "--pruning.recovery=null", "--format=packed"], METHOD),
        (["validate", "--config", "run.yaml", "--ckpt_path=last", "--output=x", "--data.val_windows=3"], METHOD),
        (["export", "--ckpt_path", "last", "--pruning.recovery=LoRA"], METHOD),
        (["validate", "--pruning.target=model"], METHOD),  # where the LLM is
    ],
)
def test_options_with_an_effect(args: Sequence[str], method: Any) -> None:
    check_effects(args, args[0], method)
