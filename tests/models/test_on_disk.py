"""Models whose weights stay on disk: the same numbers as in memory, nothing written to the source, nothing left."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.memory import limit_bytes, pruned, random_llama
from lit_prune.allocate import DLP, OWL, AlphaPruning, LayerRedundancy, Search, Uniform
from lit_prune.calibration.stream import on_device
from lit_prune.errors import InputError
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.families import find_blocks
from lit_prune.models.load import load_model
from lit_prune.models.on_disk import offload_folder, on_disk
from lit_prune.pipeline import prune, score
from lit_prune.pruning import Magnitude, MixedNofM, NofM, SparseGPT, Wanda
from lit_prune.recipe import Recipe
from lit_prune.reconstruct import Reconstruct
from lit_prune.shrink import HeadGroups, MLPWidth, Shrink
from lit_prune.slice import Slicing
from tests.conftest import FAMILIES, export, lively_model

STACKED = {"mixtral", "qwen3_moe"}
MAPPED = sorted(FAMILIES.keys() - STACKED)
RECIPES = {
    "wanda": Recipe(Wanda(), 0.5, DLP()),
    "wanda-pruned": Recipe(Wanda(propagate="pruned"), 0.5, OWL()),
    "sparsegpt": Recipe(SparseGPT(), 0.5, LayerRedundancy()),
    "sparsegpt-dense": Recipe(SparseGPT(propagate="dense"), 0.5, Uniform()),
    "magnitude": Recipe(Magnitude(), 0.5, AlphaPruning()),
    "2:4": Recipe(Wanda(pattern=NofM(2, 4)), 0.5, Uniform()),
    "mixed": Recipe(Wanda(pattern=MixedNofM(8)), 0.5, DLP()),
    "reconstructed": Recipe(Wanda(), 0.5, Uniform(), reconstruction=Reconstruct(epochs=1)),
    "some": Recipe(Wanda(), 0.5, Uniform(), targets=["q_proj"]),
}


def stored(folder: Path, family: str = "llama", shard: int | str = "1GB", **fields: object) -> str:
    lively_model(family, **fields).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)  # type: ignore[arg-type]
    return str(folder)


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def private_bytes(model: PreTrainedModel) -> int:
    """The bytes of a model's weights that are not mapped from a file, or whose pages were written."""
    mappings: list[tuple[range, int]] = []
    in_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)", line):
            span, in_file = range(int(header[1], 16), int(header[2], 16)), header[3] != "0"
        elif in_file and line.startswith("Anonymous:"):
            mappings.append((span, int(line.split()[1]) * 1024))
    written = 0
    for parameter in model.parameters():
        pages = [anonymous for span, anonymous in mappings if parameter.data_ptr() in span]
        written += pages[0] if pages else parameter.nbytes
    return written


@pytest.mark.parametrize("family", MAPPED)
def test_mapped_weights_are_those_that_are_loaded(family: str, batches: list[torch.Tensor], tmp_path: Path) -> None:
    folder = stored(tmp_path, family)
    mapped, loaded = load_model(folder, on_disk=True), load_model(folder)
    assert on_disk(mapped) is not None
    assert on_disk(loaded) is None
    assert_same(mapped.state_dict(), loaded.state_dict())
    assert torch.equal(mapped(batches[0]).logits, loaded(batches[0]).logits)
    assert private_bytes(mapped) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_shards_and_tied_weights(tied: bool, batches: list[torch.Tensor], tmp_path: Path) -> None:
    folder = stored(tmp_path, tie_word_embeddings=tied, shard=8000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    mapped = load_model(folder, on_disk=True)
    assert private_bytes(mapped) == 0
    assert (mapped.lm_head.weight.data_ptr() == mapped.model.embed_tokens.weight.data_ptr()) == tied
    assert torch.equal(mapped(batches[0]).logits, load_model(folder)(batches[0]).logits)


def test_names_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    lively_model("gpt2").transformer.save_pretrained(tmp_path)
    assert private_bytes(load_model(str(tmp_path), on_disk=True)) == 0


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_pruning_gives_the_weights_that_it_gives_in_memory(
    recipe: Recipe, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    folder = stored(tmp_path / "source")
    before = hashes(tmp_path / "source")
    mapped, loaded = load_model(folder, on_disk=True), load_model(folder)
    expected = prune(loaded, batches, recipe)
    with offload_folder(mapped, tmp_path / "target"):
        pruned = prune(mapped, batches, recipe)
        assert private_bytes(mapped) == 0
        export(mapped, tmp_path / "target")
    export(loaded, tmp_path / "in_memory")
    assert pruned.rates == expected.rates
    assert pruned.achieved == expected.achieved
    assert_same(mapped.state_dict(), loaded.state_dict())
    assert_same(read_back(tmp_path / "target"), read_back(tmp_path / "in_memory"))
    assert hashes(tmp_path / "source") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in_memory", "source", "target"]


@pytest.mark.parametrize("family", MAPPED)
def test_every_family_is_pruned_and_exported(family: str, batches: list[torch.Tensor], tmp_path: Path) -> None:
    folder = stored(tmp_path / "source", family, shard=8000)
    mapped, loaded = load_model(folder, on_disk=True), load_model(folder)
    prune(loaded, batches, Recipe())
    with offload_folder(mapped, tmp_path / "target"):
        prune(mapped, batches, Recipe())
        export(mapped, tmp_path / "target")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert opened.dtype == torch.bfloat16
    assert_same(opened.state_dict(), loaded.state_dict())
    assert torch.equal(opened(batches[0]).logits, loaded(batches[0]).logits)


def test_the_export_has_a_shard_for_every_block_and_an_index(batches: list[torch.Tensor], tmp_path: Path) -> None:
    mapped = load_model(stored(tmp_path / "source"), on_disk=True)
    with offload_folder(mapped, tmp_path / "target"):
        prune(mapped, batches)
        export(mapped, tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == [
        "config.json",
        "generation_config.json",
        *(f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in mapped.parameters())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in mapped.parameters())
    assert index["weight_map"]["model.layers.1.mlp.up_proj.weight"] == "model-00002-of-00004.safetensors"
    assert index["weight_map"]["model.embed_tokens.weight"] == "model-00004-of-00004.safetensors"
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "target" / shard)


def test_what_is_pruned_outlives_its_work_folder_and_can_be_pruned_again(
    batches: list[torch.Tensor], tmp_path: Path
) -> None:
    folder = stored(tmp_path / "source")
    mapped, loaded = load_model(folder, on_disk=True), load_model(folder)
    for sparsity in (0.3, 0.5):
        prune(loaded, batches, Recipe(sparsity=sparsity))
        with offload_folder(mapped, tmp_path / "target"):
            prune(mapped, batches, Recipe(sparsity=sparsity))
    with offload_folder(mapped, tmp_path / "target"):
        for sparsity in (0.6, 0.7):
            prune(loaded, batches, Recipe(sparsity=sparsity))
            prune(mapped, batches, Recipe(sparsity=sparsity))  # over the file that is mapped
    assert_same(mapped.state_dict(), loaded.state_dict())
    export(mapped, tmp_path / "target")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "target").state_dict(), loaded.state_dict())


def test_the_work_folder_is_beside_the_target_where_that_has_no_parent_yet(
    batches: list[torch.Tensor], tmp_path: Path
) -> None:
    mapped = load_model(stored(tmp_path / "source"), on_disk=True)
    with offload_folder(mapped, tmp_path / "runs" / "deep" / "target"):
        prune(mapped, batches)
        assert sum(path.name.startswith(".target.blocks-") for path in tmp_path.iterdir()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failure_leaves_nothing_behind_and_the_block_as_it_was(
    batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored(tmp_path / "source")
    before, mapped = hashes(tmp_path / "source"), load_model(folder, on_disk=True)
    calls = []

    def interrupted(self: Wanda, *args: object) -> None:
        calls.append(args)
        if len(calls) == 7:  # four inputs a block: within the second one
            raise KeyboardInterrupt
        return original(self, *args)

    original = Wanda.prune
    monkeypatch.setattr(Wanda, "prune", interrupted)
    with pytest.raises(KeyboardInterrupt), offload_folder(mapped, tmp_path / "target"):
        prune(mapped, batches)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert hashes(tmp_path / "source") == before
    assert private_bytes(mapped) == 0
    loaded = load_model(folder)
    changed = [
        index
        for index, (one, other) in enumerate(zip(mapped.model.layers, loaded.model.layers, strict=True))
        if any(not torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    ]
    assert changed == [0]


def test_memory_that_is_written_to_is_seen(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    loaded = load_model(folder)
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert private_bytes(loaded) == 0
    weight.data.mul_(2)
    assert private_bytes(loaded) >= weight.nbytes
    weight.data = weight.data.clone()
    assert private_bytes(loaded) >= weight.nbytes


def test_scoring_copies_nothing(batches: list[torch.Tensor], tmp_path: Path) -> None:
    folder = stored(tmp_path)
    mapped, loaded = load_model(folder, on_disk=True), load_model(folder)
    assert score(mapped, batches).scores == score(loaded, batches).scores
    assert private_bytes(mapped) == 0


def test_a_block_that_was_lent_to_another_device_is_mapped_again(tmp_path: Path) -> None:
    block = find_blocks(load_model(stored(tmp_path), on_disk=True))[1]
    parameters = list(block.module.parameters())
    before = [parameter.data_ptr() for parameter in parameters]

    def copied(device: torch.device) -> None:  # as an accelerator does, where there is none
        for parameter in parameters:
            parameter.data = parameter.data.clone()

    block.module.to = copied
    with on_device(block, torch.device("cpu")):
        assert not any(parameter.data_ptr() in before for parameter in parameters)
        block.module.to = lambda device: None
    assert [parameter.data_ptr() for parameter in parameters] == before


def test_where_there_are_no_links_shards_are_copied(
    batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    mapped = load_model(stored(tmp_path / "source"), on_disk=True)
    with offload_folder(mapped, tmp_path / "target"):
        prune(mapped, batches)
        export(mapped, tmp_path / "target")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "target").state_dict(), mapped.state_dict())


@pytest.mark.parametrize("family", MAPPED)
def test_perplexity_block_by_block_is_that_of_the_whole_model(
    family: str, batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored(tmp_path, family)
    padded = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches]
    padded[1]["attention_mask"][0, 10:] = 0
    expected = measure(load_model(folder), padded, "noise")
    mapped, runs = load_model(folder, on_disk=True), []
    for block in find_blocks(mapped):
        next(block.module.children()).register_forward_pre_hook(lambda *_args, index=block.index: runs.append(index))
    found = measure(mapped, padded, "noise")
    assert found.perplexity == expected.perplexity
    assert found.protocol == expected.protocol
    assert runs == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]  # the first is asked once what it gives, a tensor or a tuple


def test_a_family_without_an_entry_is_measured_as_a_whole(batches: list[torch.Tensor], tmp_path: Path) -> None:
    from lit_prune.models.load import new_model
    from tests.conftest import SMALL

    torch.manual_seed(0)
    new_model({"model_type": "olmo2", **SMALL}).save_pretrained(tmp_path)
    noise = [{"input_ids": batch} for batch in batches]
    mapped, loaded = load_model(str(tmp_path), on_disk=True), load_model(str(tmp_path))
    assert measure(mapped, noise, "noise").perplexity == measure(loaded, noise, "noise").perplexity


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    assert load_model(folder, "bfloat16", on_disk=True).dtype == torch.bfloat16
    with pytest.raises(
        InputError, match=r"`model.dtype` must be bfloat16 with `model.on_disk`.*got float32.*Pass `--m"
    ):
        load_model(folder, "float32", on_disk=True)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float16"))
    with pytest.raises(InputError, match=r"`model.dtype` must be bfloat16.*got float16"):
        load_model(folder, on_disk=True)
    assert private_bytes(load_model(folder, "bfloat16", on_disk=True)) == 0


def test_broken_safetensors_are_told_in_one_line(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(folder, on_disk=True)


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("")
    with pytest.raises(InputError, match=r"`model.on_disk` must be false for the .gguf file"):
        load_model(str(tmp_path / "x.gguf"), on_disk=True)


def test_nowhere_to_write_is_refused_before_anything_runs(tmp_path: Path) -> None:
    mapped = load_model(stored(tmp_path), on_disk=True)
    with pytest.raises(
        InputError, match=r"`model.on_disk` must be false where no folder .*models.on_disk.offload_folder"
    ):
        prune(mapped, [])


def test_search_on_disk_is_refused(batches: list[torch.Tensor], tmp_path: Path) -> None:
    model = load_model(stored(tmp_path / "source"), on_disk=True)
    with pytest.raises(InputError, match="`pruning.allocation` must not be Search with `model.on_disk`, .*plan"):
        score(model, batches, Recipe(allocation=Search()))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(Slicing(), 0.25),
        Recipe(MLPWidth(multiple=8), 0.5, DLP()),
        Recipe(HeadGroups(), 0.5, Uniform()),
        Recipe(Shrink([MLPWidth(multiple=8), HeadGroups()]), 0.5, Uniform()),
    ],
    ids=lambda recipe: type(recipe.method).__name__,
)
def test_other_shapes_on_disk(recipe: Recipe, batches: list[torch.Tensor], tmp_path: Path) -> None:
    folder = stored(tmp_path / "source")
    mapped, loaded = load_model(folder, on_disk=True), load_model(folder)
    prune(loaded, batches, recipe)
    with offload_folder(mapped, tmp_path / "target"):
        prune(mapped, batches, recipe)
        export(mapped, tmp_path / "target")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "target").state_dict(), loaded.state_dict())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_billion_parameters_within_one_block_and_a_constant(tmp_path: Path) -> None:
    """In processes of their own, with glibc told to give back what is freed (see benchmarks/memory.py)."""
    model = str(random_llama(tmp_path / "random"))
    assert sum(file.stat().st_size for file in (tmp_path / "random").glob("*.safetensors")) > 2e9
    constant = pruned("embedded", tmp_path / "constant", on_disk=True)
    limit = constant.peak_bytes + limit_bytes(model, "Wanda", 4 * 64)
    assert limit < 1.1e9
    run = pruned(model, tmp_path / "on_disk", on_disk=True)
    assert run.peak_bytes < limit
    report = json.loads((tmp_path / "on_disk" / "report.json").read_text())
    assert report["parameters"] > 1e9
    assert report["sparsity"]["achieved_linears"] == pytest.approx(0.5, abs=1e-4)
    assert len(list((tmp_path / "on_disk" / "model").glob("*.safetensors"))) == 23
    assert pruned(model, tmp_path / "in_memory", on_disk=False, at_most=limit).stopped
