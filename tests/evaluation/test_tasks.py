"""lm-eval on a model in memory: its own harness, with tasks whose data is local."""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import LayerRedundancy
from lit_prune.cli.main import main
from lit_prune.cli.trainer import PruneTrainer
from lit_prune.errors import InputError
from lit_prune.evaluation.tasks import HarnessSettings, Tasks, describe, names_of
from lit_prune.models.load import load_model, load_tokenizer
from lit_prune.models.quantised import quantisation
from lit_prune.pipeline import prune
from lit_prune.pruning import Wanda
from lit_prune.recipe import Recipe
from lit_prune.recover import LoRA, MaskedLoRA, adapter_config
from lit_prune.slice import Slicing

SHIPPED = Path(__file__).parents[2] / "configs" / "tasks" / "python_docs_cloze.yaml"
TASK = """task: ends
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""
QUESTIONS = [
    ("Return the number of items in the", ["list", "zebra"], 0),
    ("Raise an error if the file does not", ["purple", "exist"], 1),
    ("The default value of the argument is", ["None", "giraffe"], 0),
    ("Open the file and read its", ["mountain", "contents"], 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of four questions, its data beside it."""
    where = tmp_path_factory.mktemp("tasks")
    rows = [dict(zip(("context", "choices", "label"), question, strict=True)) for question in QUESTIONS]
    (where / "ends.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (where / "ends.yaml").write_text(TASK.format(data=where / "ends.jsonl"))
    return where


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def by_hand(model: PreTrainedModel) -> float:
    """The share of questions whose right choice has the larger log-likelihood."""
    tokenizer, right = load_tokenizer("embedded"), 0
    for context, choices, label in QUESTIONS:
        sums = []
        for choice in choices:
            start = len(tokenizer(context)["input_ids"])
            ids = torch.tensor([tokenizer(f"{context} {choice}")["input_ids"]])
            with torch.no_grad():
                logits = model(ids).logits.float().log_softmax(-1)
            sums.append(float(logits[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum()))
        right += sums.index(max(sums)) == label
    return right / len(QUESTIONS)


def masked(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    prune(model, batches, Recipe(Wanda(), 0.9))


def adapted(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    masked(model, batches)
    LoRA().attach(model)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)


def masked_adapted(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    masked(model, batches)
    MaskedLoRA().attach(model)


def sliced(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    prune(model, batches, Recipe(Slicing(), 0.25, LayerRedundancy()))


@pytest.mark.parametrize("make", [masked, adapted, masked_adapted, sliced])
def test_the_model_is_asked_as_it_is(make: Callable, folder: Path, embedded: PreTrainedModel) -> None:
    batches = list(torch.randint(1, 4096, (4, 64), generator=torch.Generator().manual_seed(0)).split(2))
    make(embedded, batches)
    embedded.train()
    tokenizer, state = load_tokenizer("embedded"), torch.get_rng_state()
    told = Tasks([str(folder / "ends.yaml")], HarnessSettings(batch_size=2)).run(embedded, tokenizer)
    assert embedded.training
    assert torch.equal(torch.get_rng_state(), state)
    assert tokenizer.pad_token == load_tokenizer("embedded").pad_token
    embedded.eval()
    result = told.results["ends"]
    assert result["acc"] == by_hand(embedded)
    assert result["samples"] == 4
    assert told.harness.startswith("lm-eval 0.")


def test_names_patterns_and_files(folder: Path) -> None:
    settings = HarnessSettings(include_path=str(folder))
    for name in ("ends", "en*", str(folder / "ends.yaml")):
        assert Tasks([name], settings).check(load=True)
    assert names_of(" arc_easy, piqa,") == ["arc_easy", "piqa"]
    assert names_of(["piqa"]) == ["piqa"]
    assert names_of(None) == []


def test_a_metric_in_a_line() -> None:
    told = {"acc": 0.5, "acc_stderr": 0.0211, "em (strict)": 0.25, "em_stderr (strict)": 0.1, "samples": 9, "shots": 0}
    assert describe(told) == "acc 0.5000 ± 0.0211, em (strict) 0.2500 ± 0.1000; 9 questions, 0 shots"


MISTAKES = [
    (["no.yaml"], {}, "must be names or YAML files that exist, got no.yaml"),
    (["ends"], {"limit": 0}, "`lm_eval.limit` must be at least 1, got 0"),
    (["ends"], {"include_path": "no"}, "`lm_eval.include_path` must be a folder, got no"),
]


@pytest.mark.parametrize(("names", "settings", "told"), MISTAKES)
def test_a_mistake_is_told(names: list[str], settings: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Tasks(names, HarnessSettings(**settings)).check()


def test_data_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "away.yaml").write_text(TASK.format(data=tmp_path / "gone.jsonl").replace("ends", "away"))
    with pytest.raises(InputError, match=r"`tasks`: .*away.yaml cannot be read, or the data cannot be loaded: "):
        Tasks([str(tmp_path / "away.yaml")]).check(load=True)


def test_a_name_that_no_task_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    class Few(TaskManager):
        """Without the fifteen thousand tasks, which take seconds to list."""

        def __init__(self, include_path: str, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Few)
    with pytest.raises(
        InputError, match="among the 1 that lm-eval knows, or a YAML file, got 'endz'. Did you mean ends"
    ):
        Tasks(["endz"], HarnessSettings(include_path=str(folder))).check()


@pytest.mark.slow
def test_near_misses_among_all_tasks() -> None:
    with pytest.raises(InputError, match="got 'arc_eazy'. Did you mean arc_easy"):
        Tasks(["arc_eazy"]).check()


SMALL = ["--model.dtype=float32", "--data.train_files=train.txt", "--data.val_files=val.txt", "--data.seq_length=32"]

WINDOWS = ["--pruning.calibration.num_samples=2", "--pruning.calibration.seq_length=32", "--data.val_windows=2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("Return the number of items in a container, or raise an error.\n" * 80)
    Path("val.txt").write_text("Open the file, read its lines and close it again when that is done.\n" * 40)
    return tmp_path


def test_the_verb(folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [f"--tasks={folder / 'ends.yaml'}", "--output=x", "--lm_eval.limit=3"]
    main(["evaluate", "--model.pretrained=embedded", "--model.dtype=float32", *args])
    report = json.loads(Path("x/report.json").read_text())
    assert report["tasks"]["results"]["ends"]["samples"] == 3
    assert "3 questions, 0 shots" in capsys.readouterr().out
    assert not Path("x/model").exists()


def test_a_fit_asks_what_it_exports(folder: Path, here: Path) -> None:
    steps = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--model.lr=1e-2", "--data.batch_size=2"]
    asked = ["--tasks=ends", f"--lm_eval.include_path={folder}"]
    main(["fit", *SMALL, *steps, *WINDOWS, *asked, "--output=x"])
    told = json.loads(Path("x/report.json").read_text())["tasks"]["results"]["ends"]
    opened = load_model("x/model", "float32")
    assert told["acc"] == by_hand(opened)
    assert f"| ends | acc {told['acc']:.4f}" in Path("x/model/README.md").read_text()
    main(["evaluate", "--model.pretrained=x/model", *asked, "--output=y", "--model.dtype=float32"])
    again = json.loads(Path("y/report.json").read_text())["tasks"]["results"]["ends"]
    assert again == told


def test_a_task_that_fails_loses_nothing(
    folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def fails(self: Tasks, model: PreTrainedModel, tokenizer: object) -> None:
        asked.append((quantisation(model) is not None, adapter_config(model)))
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Tasks, "run", fails)
    steps = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--data.batch_size=2"]
    steps += ["--pruning.recovery=QLoRA", "--pruning.recovery.form=requantised"]
    with pytest.raises(SystemExit):
        main(["fit", *SMALL, *steps, *WINDOWS, f"--tasks={folder / 'ends.yaml'}", "--output=x"])
    told = capsys.readouterr()
    assert "`tasks` could not be run: out of luck. The model is in x/model: try again with `lit-prune eval" in told.err
    assert "Traceback" not in told.err
    assert "perplexity, requantised" in told.out
    assert "tasks" not in json.loads(Path("x/report.json").read_text())
    assert Path("x/model/model.safetensors").is_file()
    assert asked == [(True, None)]  # what was written, not what was trained


def test_a_chat_needs_a_template(folder: Path) -> None:
    tasks = Tasks([str(folder / "ends.yaml")], HarnessSettings(chat=True))
    tokenizer = load_tokenizer("embedded")
    with pytest.raises(InputError, match="`lm_eval.chat` must be false for a tokenizer without a chat template"):
        tasks.check(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    tasks.check(tokenizer)


@pytest.mark.parametrize(
    ("verb", "args", "told"),
    [
        (
            "score",
            ["--tasks", "ends"],
            "`tasks` must be left out for score, which runs no tasks: use `lit-prune evaluate`",
        ),
        ("evaluate", [f"--tasks={SHIPPED}", "--lm_eval.chat=true"], "`lm_eval.chat` must be false for a tokenizer"),
        ("evaluate", [], "`tasks` must be given, such as `--tasks arc_easy,piqa`, got none"),
        ("fit", ["--tasks=no.yaml"], "`tasks` must be names or YAML files that exist, got no.yaml"),
        ("prune", ["--tasks=no.yaml"], "`tasks` must be names or YAML files that exist, got no.yaml"),
        ("prune", ["--tasks=x.yaml", "--model.on_disk=true"], "`tasks` must be left out with `model.on_disk`"),
        ("evaluate", ["--tasks=x", "--lm_eval.limit=0"], "`lm_eval.limit` must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(
    verb: str,
    args: list[str],
    told: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for other in ("fit", "prune", "evaluate"):  # where other processes are started
        monkeypatch.setattr(PruneTrainer, other, lambda *_args, **_fields: pytest.fail("it began"))
    with pytest.raises(SystemExit):
        main([verb, *SMALL, *WINDOWS, *(["--trainer.max_steps=2"] if verb == "fit" else []), *args, "--output=x"])
    message = capsys.readouterr().err
    assert f"lit-prune: error: {told}" in message
    assert "Traceback" not in message
    assert not Path("x").exists()


def test_without_lm_eval(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lit_prune.evaluation.tasks.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["evaluate", "--model.pretrained=embedded", "--tasks=piqa", "--output=x"])
    assert "`tasks` needs lm-eval, which is not installed: pip install 'lit-prune[eval]'" in capsys.readouterr().err


def test_without_a_network_the_data_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise ConnectionError("no route to host")

    hub = TASK.replace("dataset_path: json", "dataset_path: nobody/nothing").splitlines()
    (tmp_path / "hub.yaml").write_text("\n".join(hub[:2] + hub[5:]).replace("{{{{", "{{").replace("}}}}", "}}"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("lit_prune.evaluation.tasks.get_session", Session)
    begin = time.perf_counter()
    with pytest.raises(InputError, match="`tasks`: .*hub.yaml cannot be read"):
        Tasks([str(tmp_path / "hub.yaml")]).check(load=True)
    assert len(asked) == 1
    assert time.perf_counter() - begin < 20
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_nothing_is_printed_outside_a_git_repository(
    folder: Path,
    tmp_path: Path,
    embedded: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Tasks([str(folder / "ends.yaml")]).run(embedded, load_tokenizer("embedded"))
    assert "fatal" not in capfd.readouterr().err


@pytest.mark.slow
def test_the_task_that_ships_tells_a_good_model_from_a_bad_one(embedded: PreTrainedModel) -> None:
    task, tokenizer = Tasks([str(SHIPPED)]), load_tokenizer("embedded")
    dense = task.run(embedded, tokenizer).results["python_docs_cloze"]
    masked(embedded, list(torch.randint(1, 4096, (4, 64), generator=torch.Generator().manual_seed(0)).split(2)))
    pruned = task.run(embedded, tokenizer).results["python_docs_cloze"]
    assert dense["acc"] > 0.45
    assert pruned["acc"] < dense["acc"] - 2 * (dense["acc_stderr"] ** 2 + pruned["acc_stderr"] ** 2) ** 0.5


def test_the_tasks_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    listed: list[bool] = []

    class Empty(TaskManager):
        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            listed.append(include_defaults)
            super().__init__(include_path=include_path, include_defaults=False)

        def match_tasks(self, task_list: list[str]) -> list[str]:
            return task_list if listed[-1] else []

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Empty)
    tasks = Tasks(["arc_easy"])
    assert tasks.check() is tasks.check()
    assert listed == [False, True]
