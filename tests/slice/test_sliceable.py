"""Models that can be sliced pass; the others are refused with the reason, before anything changes."""

import pytest
import torch
from transformers import PreTrainedModel

from lit_prune.allocate import Uniform
from lit_prune.errors import InputError
from lit_prune.models.remote_code.modeling_sliced import SLICED
from lit_prune.pipeline import prune
from lit_prune.pruning import Wanda
from lit_prune.recipe import Recipe
from lit_prune.slice import Slicing
from lit_prune.slice.sliceable import check_sliceable
from tests.conftest import small_model


def refused(model: PreTrainedModel, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sliceable(model)


@pytest.mark.parametrize("family", sorted(SLICED))
def test_dense_models_of_the_described_families_can_be_sliced(family: str) -> None:
    check_sliceable(small_model(family))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "it normalises the outputs of attention and MLP before they are added"),
        ("gemma3_text", "it normalises the outputs of attention and MLP"),
        ("gpt2", "its norms and linears are not described"),
        ("mixtral", "its norms and linears are not described"),
    ],
)
def test_families_that_cannot_be_sliced(family: str, reason: str) -> None:
    message = rf"Slicing cannot slice the family '{family}': {reason}.*It slices llama, mistral, opt"
    refused(small_model(family), message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_layer_norm_before": False}, r"this opt \(do_layer_norm_before = False\): it normalises"),
        (
            {"word_embed_proj_dim": 16},
            r"this opt \(word_embed_proj_dim = 16\): its embedding and its residual stream have different widths",
        ),
        ({"layerdrop": 0.1}, r"this opt \(layerdrop = 0.1\): a block that is dropped in training"),
    ],
)
def test_odd_members_of_opt(fields: dict[str, object], message: str) -> None:
    refused(small_model("opt", **fields), message)


def test_models_that_something_was_done_to(batches: list[torch.Tensor]) -> None:
    sliced, masked, quantised = (small_model() for _ in range(3))
    prune(sliced, batches, Recipe(Slicing(), 0.25, Uniform()))
    refused(sliced, "`model` must not be sliced already")
    prune(masked, batches, Recipe(Wanda(), 0.5))
    refused(masked, "`model` must not have masks for Slicing, a rotation fills their zeros")
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    refused(quantised, "`model` must be sliced in full precision, its weights are quantised")


def test_blocks_that_share_weights() -> None:
    model = small_model()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    refused(model, r"its blocks share weights.*\(blocks 0 and 2, mlp\.")
