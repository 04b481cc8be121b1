"""Tasks of lm-eval (EleutherAI's evaluation harness) on a model in memory: masked, sliced, or with an adapter.

The harness's own ``HFLM`` and ``simple_evaluate`` do the evaluation.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_prune.errors import InputError, near_misses
from lit_prune.evaluation.perplexity import evaluating
from lit_prune.progress import log
from lit_prune.random_states import random_states, restore_random_states

HUB_TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class HarnessSettings:
    """Settings of lm-eval.

    Args:
        num_fewshot: Examples before every question; null uses each task's own number.
        limit: Number of questions, from the first on, that are used of every task; for quick tests.
        batch_size: Questions per forward pass.
        include_path: Folder with your own task files, whose names can then be given in `tasks`.
        chat: Render the questions with the tokenizer's chat template.

    Raises:
        InputError: for a number below 1 (`num_fewshot`: below 0), or a folder that does not exist.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    include_path: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        for name, least in {"num_fewshot": 0, "limit": 1, "batch_size": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"`lm_eval.{name}` must be at least {least}, got {value}.")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(f"`lm_eval.include_path` must be a folder, got {self.include_path}.")


@dataclass(frozen=True)
class TaskResults:
    """The results of lm-eval's tasks.

    Attributes:
        harness: lm-eval with its version.
        settings: The settings of the harness.
        results: By task, its metrics by name, and `samples`, `shots` and `version`.
        seconds: Duration of the evaluation.
    """

    harness: str
    settings: HarnessSettings
    results: Mapping[str, Mapping[str, Any]]
    seconds: float


@dataclass(frozen=True)
class Tasks:
    """Tasks by name, pattern or YAML file, with the settings of the harness.

    Args:
        names: Names such as `arc_easy`, patterns such as `mmlu*`, or files such as `my_task.yaml`.
        settings: The settings of the harness.
    """

    names: Sequence[str]
    settings: HarnessSettings = field(default_factory=HarnessSettings)

    def check(self, tokenizer: Tokenizer | None = None, *, load: bool = False) -> Any:
        """Returns the harness's task manager, after checking that it knows every task.

        Args:
            tokenizer: The model's tokenizer; for `lm_eval.chat` it must have a chat template.
            load: Also load the tasks and their data, so that missing data fails at the start of a run, not at its end.

        Raises:
            InputError: without lm-eval; for unknown names, with near misses; for data that cannot be loaded.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError("`tasks` needs lm-eval, which is not installed: pip install 'lit-prune[eval]'.")
        if self.settings.chat and tokenizer is not None and tokenizer.chat_template is None:
            raise InputError(
                "`lm_eval.chat` must be false for a tokenizer without a chat template, as this is: leave it out."
            )
        manager = self._manager
        if load:
            self._load(manager)
        return manager

    @cached_property
    def _manager(self) -> Any:
        """The manager of the tasks in `include_path`, and of the harness's own only if a name is not among these.

        Listing the nearly 15,000 tasks of the harness takes seconds.
        """
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        for path in (name for name in self.names if _is_path(name)):
            if not Path(path).is_file():
                raise InputError(f"`tasks` must be names or YAML files that exist, got {path}.")
        names, include_path = [name for name in self.names if not _is_path(name)], self.settings.include_path
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager
        log("Looking the tasks up in lm-eval")
        manager = TaskManager(include_path=include_path)
        for name in names:
            if not manager.match_tasks([name]):
                near = near_misses(name, manager.all_tasks)
                hint = f" Did you mean {' or '.join(near)}?" if near else ""
                raise InputError(
                    f"`tasks` must be among the {len(manager.all_tasks)} that lm-eval knows, or a YAML file, got "
                    f"{name!r}.{hint}"
                )
        return manager

    def _specs(self, manager: Any) -> list[str]:
        """The task names, with patterns expanded, and the paths of task files."""
        specs = [[name] if _is_path(name) else manager.match_tasks([name]) for name in self.names]
        return list(dict.fromkeys(spec for matched in specs for spec in matched))

    def _load(self, manager: Any) -> list[Any]:
        """The tasks and task groups, with their data loaded."""
        try:
            with _no_retries():
                loaded = [(spec, manager.load(spec)) for spec in self._specs(manager)]
        except Exception as error:  # what datasets raises depends on the hub's answer and on the data set
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"`tasks`: {', '.join(self.names)} cannot be read, or the data cannot be loaded: {first}. "
                "Without a hub, give a task file whose data is local."
            ) from error
        groups = [
            [content["groups"][spec]] if spec in content["groups"] else content["tasks"].values()
            for spec, content in loaded
        ]
        return [item for group in groups for item in group]

    def run(self, model: PreTrainedModel, tokenizer: Tokenizer) -> TaskResults:
        """Returns the metrics of each task, with the settings and the version of the harness.

        ``model``, ``tokenizer`` and the states of the random number generators are left unchanged.

        Args:
            model: A causal LM, evaluated on its own device.
            tokenizer: Its tokenizer.
        """
        manager = self.check()
        loaded = self._load(manager)
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        begin, states = time.perf_counter(), random_states()
        commit_hash = evaluator.get_git_commit_hash
        # Outside a repository git would print "fatal: not a git repository"; the hash is in none of our results.
        evaluator.get_git_commit_hash = lambda: None
        try:
            with evaluating(model):
                # a copy, since HFLM sets a padding token on the tokenizer, which would be exported
                harness: Any = HFLM(
                    pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=self.settings.batch_size
                )
                evaluated: Any = evaluator.simple_evaluate(
                    harness,
                    tasks=loaded,
                    num_fewshot=self.settings.num_fewshot,
                    limit=self.settings.limit,
                    apply_chat_template=self.settings.chat,
                    task_manager=manager,
                    log_samples=False,
                )
        finally:
            evaluator.get_git_commit_hash = commit_hash
            restore_random_states(states)
        return TaskResults(
            harness=f"lm-eval {importlib.metadata.version('lm-eval')}",
            settings=self.settings,
            results={name: _metrics(name, evaluated) for name in evaluated["results"]},
            seconds=time.perf_counter() - begin,
        )


@contextmanager
def _no_retries() -> Iterator[None]:
    """Makes ``datasets`` read its cache if the hub does not answer; it would retry every request for a minute."""
    flags: tuple[Any, ...] = (constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in flags]
    try:
        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except Exception:  # no connection; the type depends on the HTTP library that huggingface_hub uses
        for module in flags:
            module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(flags, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _metrics(name: str, evaluated: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a task, with a filter in parentheses after the name, and `samples`, `shots` and `version`."""
    metrics = {}
    for key, value in evaluated["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if isinstance(value, (int, float)) and filter_name:
            metrics[metric if filter_name == "none" else f"{metric} ({filter_name})"] = value
    samples = evaluated["n-samples"].get(name, {}).get("effective")
    shots, version = evaluated["n-shot"].get(name), evaluated["versions"].get(name)
    return metrics | {"samples": samples, "shots": shots, "version": version}


def describe(result: Mapping[str, Any]) -> str:
    """Returns a task's metrics in one line.

    >>> describe({"acc": 0.5, "acc_stderr": 0.0211, "samples": 9, "shots": 0, "version": 1})
    'acc 0.5000 ± 0.0211; 9 questions, 0 shots'
    """
    metrics = []
    for name, value in result.items():
        if name not in ("samples", "shots", "version") and "_stderr" not in name:
            error = result.get(re.sub(r"^(\w+)", r"\1_stderr", name))
            metrics.append(f"{name} {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
    count = "" if result["samples"] is None else f"; {result['samples']} questions, {result['shots']} shots"
    return ", ".join(metrics) + count


def names_of(tasks: str | Sequence[str] | None) -> list[str]:
    """Returns the names in a list, or in a text such as `arc_easy,piqa`."""
    parts = tasks.split(",") if isinstance(tasks, str) else tasks or []
    return [name.strip() for name in parts if name.strip()]
