"""Checks on the pretended GPU: what a device computes is what the CPU computes, and nothing is left on the other.

    python -m tests.pretended [names]     # the last line is JSON: the error of every check, null if it passed

It runs in a process of its own, see ``pretend_device``; tests/test_pretended.py starts it.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.allocate import DLP, OWL, AlphaPruning, LayerRedundancy, Uniform
from lit_prune.distill import Copy, DenseModel, SparseDelta, Student, Teacher, TopK
from lit_prune.evaluation.perplexity import evaluating, measure
from lit_prune.evaluation.speed import tokens_per_second
from lit_prune.masks.zeros import zero_shares
from lit_prune.models.families import find_blocks
from lit_prune.models.load import load_model
from lit_prune.models.on_disk import offload_folder
from lit_prune.pipeline import prune, score_with_statistics
from lit_prune.pruning import Magnitude, Method, MixedNofM, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.recover import FullFineTuning, LoRA, MaskedLoRA, Recovery
from lit_prune.recover.adapter import merge_adapter
from lit_prune.recover.layers.float32 import adamw
from lit_prune.recover.merge import without_adapter
from lit_prune.slice import Slicing
from tests.conftest import WIDE, lively_model
from tests.pretend_device import DEVICE, pretended

BATCHES = [
    {"input_ids": ids, "attention_mask": (torch.arange(16) < 16 - number)[None].expand(2, -1).long()}
    for number, ids in enumerate(torch.randint(1, 64, (3, 2, 16), generator=torch.Generator().manual_seed(1)))
]
METHODS: list[Method] = [Magnitude(), Wanda(), Wanda(propagate="pruned"), SparseGPT(), SparseGPT(propagate="dense")]
METHODS += [Wanda(pattern=MixedNofM(8)), SparseGPT(pattern=MixedNofM(8)), Slicing()]


def model_of(family: str = "llama", **fields: Any) -> PreTrainedModel:
    model = lively_model(family, **fields)
    model.config._attn_implementation = "eager"  # torch's fused attention looks at the device itself
    return model


def check_on(device: torch.device, model: nn.Module) -> None:
    """Asks whether all parameters and buffers of ``model`` are on ``device``."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    wrong = [name for name, tensor in tensors.items() if tensor.device != device]
    assert not wrong, f"{wrong} are not on {device}"


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu().float() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def check_close(one: nn.Module, other: nn.Module) -> None:
    expected, found = values(one), values(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def check_mixture() -> None:
    """Asks whether a tensor that is left on the CPU is found."""
    linear, given = nn.Linear(4, 2).to(DEVICE), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="on the same device"):
        linear(given)
    expected = copy.deepcopy(linear).to("cpu")(given)
    assert torch.equal(linear(given.to(DEVICE)).cpu(), expected)
    with pytest.raises(RuntimeError, match="on the same device"):
        given[torch.tensor([0, 1]).to(DEVICE)]
    linear(given.to(DEVICE)).sum().backward()
    assert linear.weight.grad is not None
    check_on(DEVICE, linear)


def check_prune(method: Method, family: str, whole: bool) -> None:
    alone, model = model_of(family), model_of(family)
    recipe = Recipe(method, 0.5, Uniform())
    prune(alone, BATCHES, recipe)
    if whole:
        model.to(DEVICE)
    prune(model, BATCHES, recipe, device=DEVICE)
    check_on(DEVICE if whole else torch.device("cpu"), model)
    check_close(alone, model)


def check_rates(allocation: Any) -> None:
    recipe = Recipe(Wanda(), 0.5, allocation)
    expected, _ = score_with_statistics(model_of(), BATCHES, recipe)
    found, cached = score_with_statistics(model_of(), BATCHES, recipe, device=DEVICE)
    assert max(abs(one - other) for one, other in zip(expected.rates, found.rates, strict=True)) < 1e-5
    again, _ = score_with_statistics(model_of().to(DEVICE), BATCHES, recipe, statistics=cached)  # type: ignore[arg-type]
    assert again.rates == found.rates


def check_on_disk(method: Method) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model_of(tie_word_embeddings=False).save_pretrained(folder)
        ends = []
        for device in (torch.device("cpu"), DEVICE):
            model = load_model(folder, on_disk=True, attn_implementation="eager")
            with offload_folder(model, Path(folder) / "pruned"):
                prune(model, BATCHES, Recipe(method, 0.5, Uniform()), device=device)
                ends.append((model, measure(model, BATCHES, "", device=device).perplexity))
        check_on(torch.device("cpu"), model)
        check_close(ends[0][0], ends[1][0])
        assert abs(ends[1][1] / ends[0][1] - 1) < 1e-5


def check_perplexity() -> None:
    expected = measure(model_of(), BATCHES, "").perplexity
    for model, streamed in ((model_of(), True), (model_of().to(DEVICE), False), (model_of().to(DEVICE), True)):  # type: ignore[arg-type]
        assert abs(measure(model, BATCHES, "", device=DEVICE, streamed=streamed).perplexity / expected - 1) < 1e-5
    assert tokens_per_second(model_of().to(DEVICE)).decode > 0  # type: ignore[arg-type]


def check_trial(method: Method) -> None:
    losses = []
    for device in (torch.device("cpu"), DEVICE):
        model = model_of()
        _, cached = score_with_statistics(model, BATCHES, Recipe(method, 0.5, Uniform()))
        blocks = find_blocks(model)
        trial = method.trial(model, blocks, statistics=cached.by_block, device=device, batches=BATCHES)
        with evaluating(model), trial as opened:
            losses.append([opened.loss(rates, window) for rates in ([0.25, 0.5, 0.75], [0.5] * 3) for window in (0, 5)])
        check_on(torch.device("cpu"), model)
        check_close(model_of(), model)
    assert max(abs(one - other) for one, other in zip(*losses, strict=True)) < 1e-4


def check_recovery(recovery: Recovery, dtype: torch.dtype, moves_first: bool) -> None:
    ends = []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        model = model_of(**WIDE).to(dtype)  # type: ignore[arg-type]
        prune(model, BATCHES, Recipe(Magnitude(), 0.5, Uniform()))
        pruned = zero_shares(model)[1]
        if moves_first:
            model.to(device)  # type: ignore[arg-type]
        recovery.attach(model)
        model.to(device)  # type: ignore[arg-type]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = adamw([{"params": trained}], 1e-2, (0.9, 0.95))
        for batch in BATCHES[:2]:
            ids = batch["input_ids"].to(device)
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        check_on(device, model)
        if not isinstance(recovery, LoRA):
            merge_adapter(model)
        assert zero_shares(without_adapter(model))[1] == pytest.approx(pruned, abs=1e-4)
        ends.append((model, measure(model, BATCHES, "").perplexity))
        moved = copy.deepcopy(model).to("cpu")  # as Lightning does at the end
        check_on(torch.device("cpu"), moved)
        assert abs(measure(moved, BATCHES, "").perplexity / ends[-1][1] - 1) < 1e-4
    assert abs(ends[1][1] / ends[0][1] - 1) < (1e-4 if dtype == torch.float32 else 1e-2), [end for _, end in ends]


def check_teacher(teacher: Teacher, moves_first: bool) -> None:
    """Asks whether a teacher says of a batch what it says on the CPU, after the student was cut and moved."""
    said = []
    for device in (torch.device("cpu"), DEVICE):
        model, student = model_of(), Student(Recipe(Magnitude(), 0.5, Uniform()), LoRA())
        if moves_first:
            model.to(device)  # type: ignore[arg-type]
        state = teacher.prepare(DenseModel(model, student, 1.0, device, lambda: BATCHES))
        prune(model, BATCHES, student.recipe, device=device)
        LoRA().attach(model)
        model.to(device)  # type: ignore[arg-type]
        inputs = {name: tensor.to(device) for name, tensor in BATCHES[1].items()}
        counted = inputs["attention_mask"].flatten().nonzero().flatten()
        log_p = model(**inputs).logits.detach().flatten(0, 1).log_softmax(-1)[counted]
        said.append(state.output(inputs).log_q(counted, log_p, 1.0).cpu())
        assert state.size_bytes() > 0
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)


CHECKS: dict[str, Callable[[], None]] = {"mixture": check_mixture, "perplexity": check_perplexity}
for _method in METHODS:
    for _family in ("llama", "mixtral", "gpt2") if _method.makes_zeros else ("llama", "opt"):
        for _whole in (False, True):
            _name = f"{_method!r}, {_family}, {'whole model' if _whole else 'blocks'}"
            CHECKS[_name] = partial(check_prune, _method, _family, _whole)
    CHECKS[f"{_method!r}, on disk"] = partial(check_on_disk, _method)
for _allocation in (DLP(), OWL(), AlphaPruning(), LayerRedundancy()):
    CHECKS[f"rates of {type(_allocation).__name__}"] = partial(check_rates, _allocation)
for _method in (Wanda(), Slicing()):
    CHECKS[f"trial of {type(_method).__name__}"] = partial(check_trial, _method)
for _recovery in (LoRA(), MaskedLoRA(), FullFineTuning()):
    for _dtype in (torch.float32, torch.bfloat16):
        for _first in (False, True):
            _name = f"{type(_recovery).__name__}, {_dtype}, {'moved before' if _first else 'moved after'}"
            CHECKS[_name] = partial(check_recovery, _recovery, _dtype, _first)
for _teacher in (Copy(), Copy("bfloat16"), SparseDelta(), TopK()):
    for _first in (False, True):
        _name = f"{_teacher!r}, {'moved before' if _first else 'moved after'}"
        CHECKS[_name] = partial(check_teacher, _teacher, _first)


def main(only: list[str]) -> dict[str, str | None]:
    """Runs the checks whose names contain one of ``only``; returns the error of each."""
    found: dict[str, str | None] = {}
    warnings.simplefilter("ignore")
    for name, check in CHECKS.items():
        if only and not any(part in name for part in only):
            continue
        try:
            with pretended():
                check()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    result = main(sys.argv[1:])
    for name, error in result.items():
        if error:
            print(f"== {name}\n{error}", file=sys.stderr)
    print(json.dumps(result))
