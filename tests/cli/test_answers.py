"""Answers without the full parser, held against the full parser."""

import pytest

from lit_prune.cli.answers import answer, check_options, check_verb
from lit_prune.cli.parser import LitPruneCLI
from lit_prune.cli.signatures import VERBS, options, summary
from lit_prune.errors import InputError


class Parsed(LitPruneCLI):
    """The parser alone."""

    def __init__(self) -> None:
        super().__init__(["fit"])

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def after_instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def test_verbs_and_options_are_those_of_the_full_parser() -> None:
    parsers = Parsed()._subcommand_parsers
    assert list(parsers) == list(VERBS)
    for verb, parser in parsers.items():
        assert parser.description == summary(verb)
        names = {name.removesuffix("+") for action in parser._actions for name in action.option_strings}
        long = {".".join(name.split(".")[:2]) for name in names if name.startswith("--")}
        linked = {"--data.tokenizer", "--data.trust_remote_code"}  # to options of the model
        assert options(verb) - long == linked, verb
        assert {name for name in long if not name.startswith("--format.")} <= options(verb), verb


def test_the_help_lists_the_verbs() -> None:
    printed = answer(["--help"])
    assert printed is not None
    assert printed == answer(["-h"])
    for verb in VERBS:
        assert f"  {verb:<10} {summary(verb)}" in printed
    assert "  unpack     Write the ordinary Hugging Face folder of one that was packed" in printed
    assert "on the test text; writes nothing" in printed


def test_the_version_names_the_main_libraries() -> None:
    printed = answer(["--version"])
    assert printed is not None
    assert printed.startswith("lit-prune 0.")
    assert "torch 2." in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the verb must be one of fit, validate, test, prune, score, export, evaluate, unpack."),
        (["prone"], r"must be one of fit, .*, got 'prone'. Did you mean prune\?"),
        (["--config=x", "fit"], "the verb must come first: lit-prune fit --config=x"),
        (["score", "--tasks=piqa"], "`tasks` must be left out for score, which runs no tasks"),
    ],
)
def test_a_verb_that_cannot_run(args: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_verb(args)


def test_tasks_may_stand_in_a_configuration() -> None:
    check_verb(["fit", "--tasks", "piqa"])
    check_verb(["score", "--config=run.yaml"])


def test_unpack_has_options_of_its_own() -> None:
    assert answer(["unpack", "folder", "--whatever"]) is None
    with pytest.raises(InputError, match=r"got 'unpck'. Did you mean unpack\?"):
        check_verb(["unpck"])


def test_unknown_options() -> None:
    with pytest.raises(InputError, match=r"`--outptu` is not an option. Did you mean --output\?"):
        check_options(["fit", "--outptu=x"])
    with pytest.raises(InputError, match=r"`--merge` is not an option"):
        check_options(["fit", "--merge"])
    with pytest.raises(InputError, match=r"`--zzz` is not an option. \(see lit-prune fit --help\)"):
        check_options(["fit", "--zzz", "1"])
    for option, meant in {
        "--lr": "--model.lr",
        "--num_samples": "--pruning.calibration.num_samples",
        "--pruning.num_samples": "--pruning.calibration.num_samples",
        "--outtype": "--format.outtype",
        "--gguf": "--format gguf",
        "--model_name_or_path": "--model.pretrained",
        "--pruning.ratio": "--pruning.sparsity",
    }.items():
        with pytest.raises(InputError, match=rf"`{option}` is not an option\. Did you mean {meant}\?"):
            check_options(["fit", option, "1"])
    check_options(["export", "--merge"])
    check_options(
        [
            "fit",
            "-c",
            "run.yaml",
            "--pruning.method.patern=NofM",
            "--trainer.callbacks+=Timer",
            "--model=m",
            "--format.x=1",
        ]
    )
    check_options(["fit", "--pruning.method.help=Wanda", "--lm_eval.limit=3", "--print_config=skip_unset"])
