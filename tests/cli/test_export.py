"""The verb export."""

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from lit_prune.cli.main import main
from lit_prune.masks.zeros import zeros
from lit_prune.models.load import EMBEDDED, load_tokenizer, new_model
from tests.cli.conftest import check_refused, report, run
from tests.conftest import small_model
from tests.export.running import LlamaCpp, logprobs


@pytest.mark.parametrize(("recovery", "lr"), [("MaskedLoRA", 1e-3), ("FullFineTuning", 1e-4)])
def test_a_recovery_that_keeps_the_zeros_heals_and_resumes_and_exports(recovery: str, lr: float) -> None:
    healed = [f"--pruning.recovery={recovery}", "--pruning.sparsity=0.7", f"--model.lr={lr}"]
    run("fit", "--output=runs/x", *healed, "--trainer.max_steps=15")
    first = report()
    run("fit", "--output=runs/x", *healed, "--trainer.max_steps=30", "--ckpt_path=last")
    told = report()
    perplexity, exported = told["perplexity"], told["export"]
    assert perplexity["recovered"] < first["perplexity"]["recovered"] < perplexity["pruned"]
    assert told["recovery"].startswith(recovery)
    assert not Path("runs/x/model/adapter_config.json").exists()
    assert exported["verified"]
    assert exported["merged"] is (recovery == "MaskedLoRA")
    assert abs(exported["perplexity"] - perplexity["recovered"]) <= 0.01
    assert exported["zeros_found"] >= exported["zeros_expected"] > 2e6
    assert exported["zeros_found"] == exported["zeros_expected"] or recovery == "FullFineTuning"
    opened = AutoModelForCausalLM.from_pretrained("runs/x/model")
    zero, total = zeros(w for name, w in opened.named_parameters() if "_proj" in name)
    assert zero / total == pytest.approx(0.7, abs=1e-4)

    main(["export", "--ckpt_path=runs/x/checkpoints/last.ckpt", "--merge", "--output=runs/y"])
    again = report("runs/y")
    assert again["export"] == pytest.approx(exported)
    assert again["perplexity"] == pytest.approx(perplexity)
    assert again["seconds"]["train"] > 0
    stored = [Path(run, "model/model.safetensors").read_bytes() for run in ("runs/x", "runs/y")]
    assert stored[0] == stored[1]


def test_export_of_lora_over_masks_leaves_the_adapter_beside_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--output=runs/x", "--pruning.recovery=LoRA")
    first = report()
    with pytest.raises(SystemExit):
        main(["export", "--ckpt_path", "last", "--output", "runs/x", "--merge", "--overwrite"])
    assert "`merge` must be left out for LoRA over masks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "--ckpt_path", "last", "--output", "runs/x"])
    assert "`output` has a model already, runs/x/model: choose another" in capsys.readouterr().err
    Path("runs/x/model").rename("kept")
    Path("runs/x/report.json").unlink()
    main(["export", "--ckpt_path", "last", "--output", "runs/x"])  # what fit would have left
    assert Path("runs/x/model/adapter_model.safetensors").is_file()
    assert report()["perplexity"] == pytest.approx(first["perplexity"])
    assert report()["export"]["adapter"] == "unmerged, at the root of model/"
    Path("runs/x").rename("runs/lit_prune")
    main(["export", "--ckpt_path", "last", "--overwrite"])
    assert report("runs/lit_prune")["perplexity"] == pytest.approx(first["perplexity"])
    assert Path("runs/lit_prune/checkpoints/last.ckpt").is_file()


def test_a_quantised_model_is_exported_from_its_checkpoint_and_validated(capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--output=runs/x", "--pruning.recovery=QLoRA", "--pruning.recovery.form=requantised")
    told = report()
    assert told["quantised"]["form"] == "requantised"
    assert told["bytes"] < 0.42 * told["quantised"]["bytes_unquantised"]
    assert list(told["perplexity"]) == ["dense", "pruned", "quantised", "recovered", "requantised"]
    assert told["perplexity"]["requantised"] != told["perplexity"]["recovered"]
    assert told["perplexity"]["quantised"] != told["perplexity"]["pruned"]
    assert told["export"]["perplexity"] == pytest.approx(told["perplexity"]["requantised"])
    main(["export", "--ckpt_path=runs/x/checkpoints/last.ckpt", "--merge", "--output=runs/y"])
    assert report("runs/y")["perplexity"] == pytest.approx(told["perplexity"])
    stored = [Path(run, "model/model.safetensors").read_bytes() for run in ("runs/x", "runs/y")]
    assert stored[0] == stored[1]
    assert "requantised" in Path("runs/y/model/README.md").read_text()
    capsys.readouterr()
    run("validate", "--model.pretrained=runs/x/model")
    assert f"{told['perplexity']['requantised']:.3f}"[:-1] in capsys.readouterr().out


def test_export_in_half_precision_and_of_slices() -> None:
    half = ["--model.dtype=bfloat16", "--trainer.precision=bf16-true", "--pruning.recovery=MaskedLoRA"]
    run("fit", "--output=runs/x", *half)
    main(["export", "--ckpt_path=runs/x/checkpoints/last.ckpt", "--output=runs/y", "--merge", "true"])
    assert AutoModelForCausalLM.from_pretrained("runs/y/model").dtype == torch.bfloat16
    assert report("runs/y")["perplexity"] == pytest.approx(report()["perplexity"])
    run("prune", "--output=runs/h", "--trainer.precision=bf16-true")
    assert AutoModelForCausalLM.from_pretrained("runs/h/model").dtype == torch.bfloat16
    assert report("runs/h")["perplexity"]["pruned"] == report()["perplexity"]["pruned"]  # as fit cuts
    run("fit", "--output=runs/s", "--pruning.method=Slicing", "--pruning.allocation=Uniform", "--pruning.sparsity=0.25")
    main(["export", "--ckpt_path=runs/s/checkpoints/last.ckpt", "--output=runs/t", "--merge"])
    assert report("runs/t")["slice"] == report("runs/s")["slice"]
    assert report("runs/t")["export"]["merged"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "`model.pretrained` or `ckpt_path` must be given: add `--model.pretrained FOLDER`, or `--ckpt_path FILE`"),
        (
            ["--ckpt_path=last"],
            "`ckpt_path` must be an existing checkpoint, or last, got runs/lit_prune/checkpoints/last",
        ),
        (["--ckpt_path=train.txt"], "`ckpt_path` must be a checkpoint of a fit, train.txt cannot be read"),
        (["--ckpt_path=runs/x/checkpoints/last.ckpt", "--pruning.sparsity=0.3"], "`pruning.sparsity` must be what"),
        (
            ["--ckpt_path=runs/x/checkpoints/last.ckpt", "--model.pretrained=other"],
            "`model.pretrained` must be the model that the checkpoint was made from; its weight",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_exported(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "runs/x" in str(args):
        run("fit", "--output=runs/x")
        new_model(
            {"model_type": "llama", "vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 8}
        ).save_pretrained("other")
        shutil.copy(EMBEDDED / "tokenizer.json", "other")
        shutil.copy(EMBEDDED / "tokenizer_config.json", "other")
    output = [] if args[:1] == ["--ckpt_path=last"] else ["--output=runs/y"]
    with pytest.raises(SystemExit) as ended:
        main(["export", *args, *output])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/y").exists()


def test_a_folder_is_exported_to_gguf_and_run_by_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    run("prune", "--output=runs/x", "--pruning.method=Magnitude")
    run("export", "--model.pretrained=runs/x/model", "--format", "gguf", "--format.outtype=f16", "--output=runs/y")
    assert "stores pruned weights as zeros" in capsys.readouterr().err
    assert sorted(path.name for path in Path("runs/y/model").iterdir()) == ["README.md", "model.gguf"]
    told = report("runs/y")
    assert told["perplexity"]["exported"] == pytest.approx(report()["perplexity"]["pruned"])
    assert told["export"]["format"] == "GGUF"
    assert told["export"]["perplexity"] == pytest.approx(told["perplexity"]["exported"], rel=0.01)
    assert told["export"]["zeros_found"] >= told["export"]["zeros_expected"] > 1e6
    assert told["bytes"] == pytest.approx(2 * told["parameters"], rel=1e-2)
    assert told["recipe"]["method"].startswith("Magnitude")
    assert "train" not in told["seconds"]
    card = Path("runs/y/model/README.md").read_text()
    assert "llama-cli -m this/folder/model.gguf" in card
    assert "\n- gguf\n" in card
    assert "library_name" not in card

    model, ids = (
        AutoModelForCausalLM.from_pretrained("runs/x/model"),
        load_tokenizer("embedded")("Open it")["input_ids"],
    )
    found = LlamaCpp(Path("runs/y/model/model.gguf")).logprobs([*ids, 5, 6], 3)
    torch.testing.assert_close(found, logprobs(model, [*ids, 5, 6], 3), atol=0.05, rtol=0)


def test_a_folder_with_blocks_of_different_sizes_is_exported_to_gguf() -> None:
    width = ["--pruning.method=MLPWidth", "--pruning.allocation=DLP", "--pruning.sparsity=0.3"]
    run("prune", "--output=runs/x", *width)
    model, ids = (
        AutoModelForCausalLM.from_pretrained("runs/x/model", dtype=torch.float32),
        load_tokenizer("embedded")("Open it")["input_ids"],
    )
    assert len(set(model.config.block_sizes["intermediate_size"])) > 1
    run("export", "--model.pretrained=runs/x/model", "--format=gguf", "--output=runs/y")
    assert report("runs/y")["bytes"] == pytest.approx(report()["bytes"], rel=2e-3)  # vectors are f32
    assert report()["bytes"] < 2 * 4e6 * 0.9
    assert "Shrunk with MLPWidth" in Path("runs/y/model/README.md").read_text()
    found = LlamaCpp(Path("runs/y/model/model.gguf")).logprobs([*ids, 5, 6], 3)
    # llama.cpp rounds activations to bfloat16 where the weights are
    torch.testing.assert_close(found, logprobs(model, [*ids, 5, 6], 3), atol=0.05, rtol=0)

    masking = ["--pruning.method=Magnitude", "--pruning.allocation=Uniform", "--pruning.sparsity=0.1"]
    run("prune", "--model.pretrained=runs/y/model/model.gguf", "--output=runs/z", *masking)
    assert report("runs/z")["perplexity"]["before"] == pytest.approx(report()["perplexity"]["pruned"], rel=1e-4)
    masked = AutoModelForCausalLM.from_pretrained("runs/z/model")
    assert masked.config.block_sizes == model.config.block_sizes


def test_a_shrunk_folder_is_masked_and_packed(capsys: pytest.CaptureFixture[str]) -> None:
    shrinking = ["--pruning.method=MLPWidth", "--pruning.sparsity=0.25"]
    run("prune", "--output=runs/narrow", *shrinking)
    narrow = ["--model.pretrained=runs/narrow/model"]
    masking = ["--pruning.method=Magnitude", "--pruning.allocation=Uniform", "--pruning.sparsity=0.5"]
    run("prune", "--output=runs/masked", *narrow, *masking, "--format=packed")
    told = report("runs/masked")
    assert list(told["perplexity"]) == ["before", "pruned", "recovered"]
    assert told["sparsity"]["achieved_linears"] == pytest.approx(0.5, abs=1e-4)
    assert told["parameters"] == report("runs/narrow")["parameters"] == 4_033_728 - 8 * 128 * 3 * 192
    assert told["bytes"] < 0.75 * told["bytes_unpacked"]
    assert told["mlp_width"]["units"] == [384] * 8
    card = Path("runs/masked/model/README.md").read_text()
    assert "Shrunk by an earlier cut: the blocks have 384 of their 512" in card
    opened = AutoModelForCausalLM.from_pretrained("runs/masked/model")
    assert (type(opened).__name__, opened.config.intermediate_size) == ("LlamaForCausalLM", 384)
    zero, total = zeros(weight for name, weight in opened.named_parameters() if "_proj" in name)
    assert zero / total == pytest.approx(0.5, abs=1e-4)
    check_refused(
        "`model` must not have masks for MLPWidth", capsys, "--model.pretrained=runs/masked/model", *shrinking
    )
    check_refused("must have the adapter merged", capsys, *narrow, *masking, "--format=gguf", "--pruning.recovery=LoRA")
    check_refused("without pruned weights, got Packed", capsys, *narrow, "--format=packed", verb="export")


def test_a_masked_folder_loses_blocks_and_is_exported_again() -> None:
    run("prune", "--output=runs/masked", "--pruning.method=Magnitude", "--pruning.sparsity=0.5")
    masked = "--model.pretrained=runs/masked/model"
    run("prune", "--output=runs/short", masked, "--pruning.method=Depth", "--pruning.sparsity=0.25")
    run("export", "--output=runs/again", "--model.pretrained=runs/short/model")
    for folder in ("runs/short", "runs/again"):
        assert report(folder)["depth"]["requested"] == 0.25
        assert "Shortened with Depth, rates" in Path(folder, "model/README.md").read_text()
    assert report("runs/again")["sparsity"]["achieved_linears"] == pytest.approx(0.5, abs=0.05)


def test_a_folder_is_exported_as_it_is() -> None:
    run("export", "--model.pretrained=embedded", "--output=runs/x")
    assert AutoModelForCausalLM.from_pretrained("runs/x/model").dtype == torch.bfloat16
    assert "# embedded, exported with lit_prune" in Path("runs/x/model/README.md").read_text()
    assert list(report()["perplexity"]) == ["exported"]


def test_a_fit_and_its_checkpoint_are_exported_to_gguf() -> None:
    run("fit", "--output=runs/x", "--pruning.recovery=MaskedLoRA", "--format=gguf")
    assert "lit_prune.export.formats.GGUF" in Path("runs/x/config.yaml").read_text()
    first = report()
    assert first["export"]["merged"]
    assert first["export"]["perplexity"] == pytest.approx(first["perplexity"]["recovered"], rel=1e-3)
    main(["export", "--ckpt_path=runs/x/checkpoints/last.ckpt", "--format.outtype=q8_0", "--output=runs/y"])
    assert report("runs/y")["bytes"] == pytest.approx(34 / 32 / 2 * first["bytes"], rel=1e-2)
    assert report("runs/y")["export"]["zeros_found"] >= first["export"]["zeros_expected"]


@pytest.mark.parametrize(
    ("verb", "args", "message"),
    [
        ("export", ["--model.pretrained=embedded", "--model.on_disk=true"], "`model.on_disk` must be false for export"),
        ("export", ["--model.pretrained=opt", "--format=gguf"], "of the families cohere, .*, got opt: use"),
        (
            "export",
            ["--model.pretrained=embedded", "--format=gguf", "--format.outtype=q4"],
            "must be one of auto, f32,",
        ),
        (
            "export",
            ["--model.pretrained=embedded", "--format=ggfu"],
            "must be one of GGUF, HuggingFace, Packed, .*mean GGUF",
        ),
        (
            "prune",
            ["--format=gguf", "--pruning.method=Slicing"],
            "must not have a sliced model, whose shortcut matrices",
        ),
        (
            "fit",
            ["--format=gguf", "--pruning.recovery=LoRA"],
            "must have the adapter merged, got one beside the weights: train with",
        ),
        ("fit", ["--format=gguf", "--pruning.recovery=QLoRA"], "must have the adapter merged"),
        ("prune", ["--format=gguf", "--model.pretrained=words"], "must have a model and a tokenizer that llama.cpp's"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(
    verb: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--model.pretrained=opt" in args:
        small_model("opt", vocab_size=4096, max_position_embeddings=512).save_pretrained("opt")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EMBEDDED / file, "opt")
    if "--model.pretrained=words" in args:
        small_model("llama", vocab_size=4096, max_position_embeddings=512).save_pretrained("words")
        tokenizer = load_tokenizer("embedded")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
        tokenizer.save_pretrained("words")
    monkeypatch.setattr("lit_prune.fit.module.load_model", lambda *args: pytest.fail("the weights were loaded"))
    check_refused(message, capsys, *args, verb=verb)
