"""Sizes that are asked for on the command line, and what comes out."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.cli.conftest import check_refused, last_cut, report, run

WIDTH = ["--pruning.method=MLPWidth"]
CHANNELS = 64 * 3 * 192 * 8  # parameters of one multiple of channels in each of the 8 blocks of the embedded model


def test_the_bytes_of_the_exported_folder() -> None:
    run("prune", "--output=runs/x", *WIDTH, "--pruning.target_bytes=6.5MB")
    found = report()["target"]
    assert (found["unit"], found["requested"], found["achieved"]) == ("bytes", 6_500_000, report()["bytes"])
    assert abs(found["achieved"] - 6_500_000) <= CHANNELS  # half a multiple, in bfloat16
    assert Path("runs/x/model/model.safetensors").stat().st_size == pytest.approx(
        found["achieved"], rel=2e-3
    )  # the header
    assert "Asked for were 6,500,000 bytes; " in Path("runs/x/model/README.md").read_text()
    assert report()["mlp_width"]["budget"] == "parameters"
    # the default allocation of the method: blocks of one size, in the class of the family
    saved = yaml.safe_load(Path("runs/x/config.yaml").read_text())["pruning"]["allocation"]
    assert saved == {"class_path": "lit_prune.Uniform"}
    assert report()["recipe"]["allocation"] == "Uniform()"
    assert "rates per block by Uniform:" in Path("runs/x/model/README.md").read_text()
    assert type(AutoModelForCausalLM.from_pretrained("runs/x/model")).__name__ == "LlamaForCausalLM"


def test_several_cuts_to_a_number_of_parameters() -> None:
    run("fit", "--output=runs/x", *WIDTH, "--pruning.target_parameters=3.2M", "--pruning.at_step=[0,1]")
    model = AutoModelForCausalLM.from_pretrained("runs/x/model")
    assert abs(model.num_parameters() - 3.2e6) <= CHANNELS / 2
    first, last = (cut["requested"] for cut in report()["cuts"])
    assert 0 < first < last
    run("export", "--ckpt_path=runs/x/checkpoints/last.ckpt", "--output=runs/y")
    assert report("runs/y")["target"] == report()["target"]


def test_several_parts_from_yaml() -> None:
    Path("parts.yaml").write_text(
        """
pruning:
  method:
    class_path: Shrink
    init_args:
      parts:
      - class_path: MLPWidth
        init_args: {multiple: 16}
      - HeadGroups
  target_parameters: 3M
"""
    )
    run("prune", "--output=runs/x", "--config=parts.yaml")
    found = report()["shrink"]
    assert set(found["parts"]) == {"mlp_width", "head_groups"}
    model = AutoModelForCausalLM.from_pretrained("runs/x/model")
    assert model.config.intermediate_size == found["parts"]["mlp_width"]["units"][0] < 512
    assert model.config.num_key_value_heads == found["parts"]["head_groups"]["units"][0]
    assert abs(model.num_parameters() - 3e6) <= CHANNELS / 64 * 16 / 2
    card = Path("runs/x/model/README.md").read_text()
    run("export", "--output=runs/y", "--model.pretrained=runs/x/model")
    assert report("runs/y")["shrink"]["parts"] == found["parts"]
    assert "Shrunk with Shrink(parts=[MLPWidth(multiple=16" in card
    assert "of their 512 channels of the MLP" in card
    assert "key/value groups" in card


@pytest.mark.parametrize("verb", ["prune", "fit"])
def test_a_perplexity(verb: str) -> None:
    run(verb, "--output=runs/x", "--pruning.method=Magnitude", "--pruning.target_perplexity=40")
    found, after = report()["target_perplexity"], last_cut()["perplexity"]["after"]
    assert (found["limit"], found["perplexity"]) == (40, after)
    assert found["before"] == last_cut()["perplexity"]["before"] < 40
    assert 30 < after <= 40
    assert last_cut()["requested"] == found["sparsity"] == report()["sparsity"]["requested"]
    assert len(found["trials"]) == 8
    card = Path("runs/x/model/README.md").read_text()
    assert f"Asked for was a perplexity of at most 40; a sparsity of {found['sparsity']:.4f} has " in card


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--pruning.target_parameters=1k"],
            "`pruning.target_parameters` must be between .* for MLPWidth, .*, got 1,000",
        ),
        (["--pruning.target_bytes=1kB"], "`pruning.target_bytes` must be between .* for MLPWidth, .*, got 1,000"),
        (
            ["--pruning.target_bytes=6MB", "--pruning.sparsity=0.2"],
            "`pruning.sparsity` and `pruning.target_bytes` must",
        ),
    ],
)
def test_what_is_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(message, capsys, *WIDTH, *args, verb="prune")
