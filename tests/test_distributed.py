"""Several processes over gloo: the same statistics, masks, slices and perplexity as one process has."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from lit_prune import distributed
from lit_prune.allocate import DLP, LayerRedundancy, Search
from lit_prune.calibration.statistics import COSINE, GRAM, INPUTS, BlockStatistics
from lit_prune.calibration.stream import Stream, observe
from lit_prune.data.loaders import ResumableLoader, ShardedSampler
from lit_prune.depth import Depth
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.experts import Experts
from lit_prune.hidden import HiddenWidth
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import prune
from lit_prune.pruning import SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct
from lit_prune.reconstruct.training import _summed
from lit_prune.shrink import MLPWidth
from lit_prune.slice import Slicing
from tests.conftest import lively_model, small_model

RECIPES = {
    "llama": (
        *(Wanda(propagate="pruned"), SparseGPT(), Slicing(), MLPWidth(multiple=8)),
        *(HiddenWidth(multiple=8), Depth(refit=True, damping=1.0)),
    ),
    "mixtral": (Wanda(), Experts()),  # with so few tokens some experts are seen by one process alone
}
BOUND = 1e-5  # relative: sums of float32 in another order


def windows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, 64, (5, 1, 12), generator=torch.Generator().manual_seed(1))
    return [
        {"input_ids": row, "attention_mask": (torch.arange(12) < 12 - index)[None]} for index, row in enumerate(ids)
    ]


def cut(family: str, method: Any) -> dict[str, Any]:
    model = lively_model(family)
    recipe = Recipe(method, 0.5, {Slicing: LayerRedundancy(), MLPWidth: DLP()}.get(type(method)))
    pruned = prune(model, windows(), recipe)
    found = measure(model, windows(), "noise")
    return {
        "weights": model.state_dict(),
        "rates": pruned.rates,
        "perplexity": found.perplexity,
        "protocol": found.protocol,
    }


def observed() -> list[BlockStatistics]:
    model = small_model("mixtral")
    blocks = find_blocks(model)
    stream = Stream(model, blocks, distributed.shard(windows()), torch.device("cpu"))
    return [observe(stream, block, frozenset({INPUTS, GRAM, COSINE})) for block in blocks]


def reconstructed() -> dict[str, Any]:
    """A cut with reconstruction on windows of which the last process has no more to train on than the first."""
    model, recipe = lively_model("mixtral"), Recipe(Wanda(), 0.5, DLP(), reconstruction=Reconstruct(epochs=2))
    pruned = prune(model, windows()[:4], recipe)
    return {"weights": model.state_dict(), "losses": pruned.reconstruction}


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {"observed": observed(), "reconstructed": reconstructed()}
    for family, methods in RECIPES.items():
        for method in methods:
            found[f"{family} {type(method).__name__}"] = cut(family, method)
    return found


def work(rank: int, number: int, port: int, folder: str) -> None:
    """The work of one process; it fails by an exception."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(rank + 1)
    dist.init_process_group("gloo", rank=rank, world_size=number)
    assert (distributed.world_size(), distributed.rank(), distributed.is_rank_zero()) == (number, rank, rank == 0)
    distributed.agree_on_threads()
    assert torch.get_num_threads() == 1
    assert distributed.all_reduce_count(rank + 1) == sum(range(1, number + 1))
    assert distributed.all_gather(rank) == list(range(number))
    own = list(distributed.equal_batches(range(number + 1)))
    assert own == [(rank, True), (number, rank == 0)]
    with distributed.single_process():
        assert distributed.world_size() == 1
        assert distributed.shard([1, 2]) == [1, 2]
        assert distributed.all_reduce_count(3) == 3
        assert distributed.is_rank_zero() == (rank == 0)
    sums = _summed([torch.full((1, 2), rank + 1.0), torch.ones(3)])
    assert [part.tolist() for part in sums] == [[[sum(range(1, number + 1))] * 2], [number] * 3]
    distributed.check_same("A number", 1)
    with pytest.raises(RuntimeError, match=rf"A number must be the same in all processes, processes \[{number - 1}\]"):
        distributed.check_same("A number", rank == number - 1)
    with pytest.raises(InputError, match=f"got 1 batches for {number} processes"):
        distributed.shard([0])
    with pytest.raises(InputError, match="must not be Search in several processes: search in one"):
        Recipe(allocation=Search()).check(small_model())
    torch.save(everything() | {"order": orders()}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def orders() -> dict[str, Any]:
    items: Any = list(range(11))
    loader = ResumableLoader(items, batch_size=2, seed=3)
    loader.load_state_dict({"epoch": 0, "batches": 1})
    return {"train": [batch.tolist() for batch in loader], "in turn": list(ShardedSampler(items))}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each process."""
    folder, number = tmp_path_factory.mktemp("processes"), request.param
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (number, port, str(folder)), nprocs=number)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]


def test_all_processes_see_what_one_sees(found: list[dict[str, Any]]) -> None:
    for block, alone in enumerate(observed()):
        for process in found:
            together = process["observed"][block]
            assert together.shared_inputs == alone.shared_inputs
            assert together.cosine == pytest.approx(alone.cosine, rel=BOUND)
            for kind in ("norms", "grams"):
                one, several = getattr(alone, kind), getattr(together, kind)
                torch.testing.assert_close(several, one, rtol=BOUND, atol=1e-6)
                assert all(
                    torch.equal(value, getattr(found[0]["observed"][block], kind)[n]) for n, value in several.items()
                )


@pytest.mark.parametrize(("family", "method"), [(f, m) for f, methods in RECIPES.items() for m in methods])
def test_cuts_and_perplexity_are_those_of_one_process(found: list[dict[str, Any]], family: str, method: Any) -> None:
    alone, name = cut(family, method), f"{family} {type(method).__name__}"
    for process in found:
        together = process[name]
        assert together["protocol"] == alone["protocol"]
        assert together["rates"] == pytest.approx(alone["rates"], rel=BOUND)
        assert together["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
        for weight, one in alone["weights"].items():
            assert torch.equal(together["weights"][weight], found[0][name]["weights"][weight])
            if not isinstance(method, Slicing):
                assert torch.equal(together["weights"][weight] == 0, one == 0), weight


def test_reconstructed_weights_are_the_same_in_all_processes(found: list[dict[str, Any]]) -> None:
    alone, first = reconstructed(), found[0]["reconstructed"]
    assert any(losses.kept for losses in first["losses"])
    for process in found:
        assert process["reconstructed"]["losses"] == first["losses"]
        for name, weight in first["weights"].items():
            assert torch.equal(process["reconstructed"]["weights"][name], weight), name
    for losses, one in zip(first["losses"][:1], alone["losses"][:1], strict=True):
        assert losses.train_before == pytest.approx(one.train_before, rel=BOUND)
        assert losses.held_out_before == pytest.approx(one.held_out_before, rel=BOUND)


def test_every_step_reads_what_one_process_reads_in_a_larger_batch(found: list[dict[str, Any]]) -> None:
    items: Any = list(range(11))
    number = len(found)
    one = ResumableLoader(items, batch_size=2 * number, seed=3)
    one.load_state_dict({"epoch": 0, "batches": 1})
    whole = [batch.tolist() for batch in one]
    steps = zip(*(process["order"]["train"] for process in found), strict=True)
    for batch, parts in zip(whole, steps, strict=False):
        together = sorted(index for part in parts for index in part)
        assert set(together) <= set(batch)
        assert len(together) == len(batch) // number * number
    turns = [process["order"]["in turn"] for process in found]
    assert sorted(index for turn in turns for index in turn) == items


def test_one_process_does_nothing_special() -> None:
    assert (distributed.world_size(), distributed.rank(), distributed.is_rank_zero()) == (1, 0, True)
    assert distributed.shard([1]) == [1]
    assert list(distributed.equal_batches("ab")) == [("a", True), ("b", True)]
    threads = torch.get_num_threads()
    distributed.agree_on_threads()
    assert torch.get_num_threads() == threads
    value = torch.ones(2)
    assert distributed.all_reduce_sum(value) is value
    assert distributed.all_gather("x") == ["x"]
