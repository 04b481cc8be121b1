from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lit_prune.evaluation.tasks import HarnessSettings, TaskResults
from lit_prune.report.card import model_card
from lit_prune.report.sections import Quantised, Shape, Sparsity, TargetSize
from lit_prune.report.wording import describe_protocol
from lit_prune.schedule import Cut
from tests.report.reports import PROTOCOL, RECIPE, REPORT, SHAPE, SLICED, SLICES, cut, sparsity

FOUND = replace(
    sparsity(REPORT, before=0.5, achieved_linears=0.51), recipe=None, baseline={"masked": True}, adapter=None
)


def test_what_was_done_and_what_it_cost() -> None:
    card = model_card(REPORT, "some/model", "USAGE")
    for part in (
        "# some/model, pruned with",
        "Pruned with Wanda, rates per block by DLP, at a sparsity of 0.5",
    ):
        assert part in card
    for part in (
        "Of the weights in the pruned linears, 49.99%",
        "and of all parameters 39.00%.",
        "| recovered | 30.000 |",
    ):
        assert part in card
    assert f"Measured on {describe_protocol(PROTOCOL)}." in card
    assert "Parameters: 1,000,000 and 8,000 of the adapter" in card
    assert "No perplexity was measured." in model_card(replace(REPORT, protocol=None), "x", "")


def test_a_reconstruction_is_named() -> None:
    card = model_card(replace(REPORT, recipe={**RECIPE, "reconstruction": "Reconstruct(epochs=6, lr=0.002)"}), "x", "")
    assert "DLP, every block then trained towards its dense output by Reconstruct(epochs=6), at a sparsity" in card


def test_the_hub_reads_it() -> None:
    card = ModelCard(model_card(REPORT, "some/model", "USAGE"))
    assert card.data.tags == ["pruning", "sparse", "lit-prune"]
    assert card.data.library_name == "transformers"
    assert "base_model" not in card.data.to_dict()
    assert ModelCard(model_card(REPORT, "x", "USAGE", base_model="some/model")).data.base_model == "some/model"
    file = ModelCard(model_card(REPORT, "some/model", "USAGE", library_name=None, tags=["gguf"]))
    assert file.data.tags == ["pruning", "sparse", "lit-prune", "gguf"]
    assert "library_name" not in file.data.to_dict()


def test_a_smaller_model_is_sparse_only_if_it_has_masks_too() -> None:
    for zeros, tags in ((0.0, ["pruning", "lit-prune"]), (0.4, ["pruning", "sparse", "lit-prune"])):
        report = replace(SLICED, sparsity=replace(SLICED.sparsity, achieved_linears=zeros, achieved_all=zeros))
        assert ModelCard(model_card(report, "some/model", "USAGE")).data.tags == tags


def test_the_format_says_how_the_folder_is_opened() -> None:
    assert "## How to open it\n\nopen it so\n" in model_card(REPORT, "x", "open it so")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"recovery": "LoRA()"}, "Recovered with LoRA(): an adapter was trained. It is saved beside the pruned"),
        ({"recovery": "MaskedLoRA()", "merged": True}, "an adapter was trained and is merged into the weights, which"),
        (
            {"recovery": "FullFineTuning()", "adapter": None},
            "own weights were trained; pruned weights stayed zero.",
        ),
        ({"merged": True, "recipe": None}, "Recovered: an adapter was trained and is merged into the weights.\n"),
        (
            {"adapter": None, "distillation": "T"},
            "Recovered, distilled from the model before its cuts (T): the model's own",
        ),
        ({"recovery": "LoRA()", "baseline": {"recipe": RECIPE}}, "Trained with LoRA(): an adapter was trained."),
    ],
)
def test_what_was_trained_and_where_that_is(fields: dict[str, Any], text: str) -> None:
    assert text in model_card(replace(REPORT, **fields), "x", "")


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("adapter", "adapter was trained over them. The adapter is not merged, but saved beside the quantised"),
        ("merged", "adapter was trained over them that keeps the zeros. It is merged into weights in full precision."),
        ("requantised", "It is merged, and the result is quantised again."),
    ],
)
def test_what_was_trained_over_quantised_weights(form: str, text: str) -> None:
    quantised = Quantised("nf4", True, form, 9_000_000)
    card = model_card(replace(REPORT, recovery="QLoRA()", quantised=quantised), "x", "")
    assert "Recovered with QLoRA(). The linears were quantised to nf4, and" in card
    assert text in card


def test_what_earlier_runs_have_done() -> None:
    exported = {"baseline": {"recipe": RECIPE}, "adapter": None, "seconds": {}, "shape": Shape(SLICES, 0.25)}
    card = model_card(replace(REPORT, recovery="LoRA()", distillation="T", **exported), "x", "")  # type: ignore[arg-type]
    assert ", in an earlier run: the residual stream has" in card
    assert "\nTrained with LoRA(), distilled from the model before its cuts (T) in an earlier run.\n" in card


def test_masks_on_a_model_of_another_shape() -> None:
    card = model_card(replace(REPORT, structures=[SLICES]), "x", "")
    assert " Sliced by an earlier cut: the residual stream has 40 to 56 of its 64" in card
    assert "by an earlier cut" not in model_card(
        replace(REPORT, structures=[SLICES], shape=Shape(SLICES, 0.25)), "x", ""
    )


def test_a_model_that_was_not_trained() -> None:
    card = model_card(replace(REPORT, adapter=None), "x", "")
    assert "Recovered" not in card
    assert "Trained" not in card


def test_cuts_during_the_training() -> None:
    assert "before optimizer step" not in model_card(replace(REPORT, cuts=[cut(0)]), "x", "")
    assert ", before optimizer step 4 (50.00%)." in model_card(replace(REPORT, cuts=[cut(4)]), "x", "")
    several = model_card(replace(REPORT, cuts=[cut(0, 0.25), cut(4)], cuts_not_made=[Cut(9, 0.6)]), "x", "")
    assert "during training, before optimizer steps 0 (25.00%), 4 (50.00%)." in several
    assert "Training ended early: the cuts before optimizer step 9 (60.00%) were not made." in several


def test_zeros_that_were_there_before() -> None:
    card = model_card(sparsity(REPORT, before=0.25), "x", "")
    assert "Before this run, 25.00% of the linears' weights were zero." in card


def test_a_model_that_was_only_trained() -> None:
    card = model_card(FOUND, "x", "")
    assert "# x, trained with lit_prune" in card
    assert "already pruned, and training kept its zeros: 50.00% of the linears' weights" in card
    assert "51.00% are now." in card
    before = replace(FOUND, recipe=RECIPE, baseline={"recipe": RECIPE})
    assert "before it was trained here." in model_card(before, "x", "")
    dense = replace(FOUND, sparsity=Sparsity(requested=None, achieved_linears=0.0, achieved_all=0.0), baseline={})
    assert "No pruning of it is recorded." in model_card(dense, "x", "")
    assert ModelCard(model_card(dense, "x", "")).data.tags == ["pruning", "lit-prune"]


def test_a_sliced_model() -> None:
    card = model_card(SLICED, "some/model", "USAGE")
    assert "Sliced with Wanda, rates per block by DLP: the residual stream has 40 to 56 of its 64" in card
    assert "merged into the weights.\n" in card
    assert "zero" not in card
    assert "\n- memory when opened: 4.0 MB, dense 3.0 MB  (+33.3%)\n- tokens per second, prefill: 150, dense" in card
    assert (
        "\n\nSpeeds are those of one sequence in float32; both models were measured by turns in one process.\n\n"
        in card
    )
    slow = replace(SLICED, shape=replace(SHAPE, before=replace(SHAPE.before, speed=None)))
    assert "memory when opened" in model_card(slow, "some/model", "USAGE")
    assert "by turns" not in model_card(slow, "some/model", "USAGE")


def test_the_tasks() -> None:
    tasks = TaskResults("lm-eval 0.4", HarnessSettings(), {"arc": {"acc": 0.5, "samples": None}}, 1.5)
    card = model_card(replace(REPORT, tasks=tasks), "x", "")
    assert "| task, lm-eval 0.4 | |\n| --- | --- |\n| arc | acc 0.5000 |\n" in card
    assert "| task" not in model_card(REPORT, "x", "")


def test_the_type_of_weights_that_were_rounded() -> None:
    rounded = replace(REPORT, dtype="bfloat16")
    told = model_card(rounded, "some/model", "")
    assert "in bfloat16 and float32, zeros stored. The weights were float32 in memory and are written in" in told
    assert "The last perplexity is theirs" in told
    assert "are written in" not in model_card(REPORT, "some/model", "")
    assert "The last perplexity" not in model_card(replace(rounded, protocol=None), "some/model", "")


def test_zeros_that_are_not_stored() -> None:
    packed = model_card(replace(REPORT, bytes_unpacked=8_000_000), "some/model", "")
    assert "39.00%. They are not stored, which makes the folder smaller; opened, the model is dense" in packed
    assert "4.0 MB in float32, packed; 8.0 MB with the zeros." in packed
    assert "39.00%. Zeros are stored like other weights" in model_card(REPORT, "some/model", "")


def test_the_size_that_was_asked_for() -> None:
    asked = replace(SLICED, target=TargetSize("bytes", requested=4_100_000, achieved=4_000_000))
    assert ". Asked for were 4,100,000 bytes; 4,000,000 came out  (-2.44%)." in model_card(asked, "x", "")
    assert "Asked for" not in model_card(SLICED, "x", "")
