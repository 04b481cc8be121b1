"""A trial of slices is the rotated model with the stream's last axes struck out."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lit_prune.calibration.windows import Batch
from lit_prune.evaluation.perplexity import measure
from lit_prune.models.families import find_blocks
from lit_prune.models.remote_code.modeling_sliced import SlicedLayer
from lit_prune.slice import Slicing
from lit_prune.slice.trial import SlicedTrial
from tests.conftest import lively_model

RATES = [0.25, 0.5, 0.0]


@pytest.fixture
def dicts(batches: list[torch.Tensor]) -> list[Batch]:
    return [{"input_ids": batch} for batch in batches]


def struck(module: nn.Module, name: str, width: int) -> None:
    """Multiplies what a method of ``module`` returns by a vector of ``width`` ones and zeros behind them."""
    own: Callable[..., torch.Tensor] = getattr(module, name)

    def masked(*args: object, **kwargs: object) -> torch.Tensor:
        y = own(*args, **kwargs)
        return y * (torch.arange(y.shape[-1]) < width)

    setattr(module, name, masked)


def strike(model: PreTrainedModel, widths: list[int]) -> None:
    """Strikes the axes out at every point, in a model of full width."""
    layout = model.layer_class.layout
    for name in layout.embeddings:
        struck(model.get_submodule(name), "forward", widths[0])
    for index, layer in enumerate(model.get_submodule(layout.layers).children()):
        assert isinstance(layer, SlicedLayer)
        own = layer.take

        def take(
            step: object, *args: object, own: Callable = own, index: int = index, **kwargs: object
        ) -> torch.Tensor:
            y = own(step, *args, **kwargs)
            width = widths[index + 1] if step is layout.steps[-1] else widths[index]
            return y * (torch.arange(y.shape[-1]) < width)

        layer.take = take  # type: ignore[method-assign]


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi", "opt", "phi3", "qwen3"])
def test_a_trial_strikes_out_axes_and_leaves_the_model_alone(family: str, slice_head: bool, dicts: list[Batch]) -> None:
    model, method = lively_model(family), Slicing(slice_head=slice_head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = measure(model, dicts, "x").perplexity
    blocks, device = find_blocks(model), model.device
    with method.trial(model, blocks, statistics=[], device=device, batches=dicts) as trial:
        assert isinstance(trial, SlicedTrial)
        assert trial.granularity == [8, 8, 8]
        trial.take(RATES)
        sliced = [trial.loss(RATES, window) for window in range(6)]
        whole = [trial.loss([0.0] * 3, window) for window in range(6)]
        strike(trial.model, [24, 16, 32, 24 if slice_head else 32])
        expected = measure(trial.model, dicts, "x").perplexity
    assert math.exp(sum(sliced) / 6) == pytest.approx(expected, rel=1e-5)
    assert math.exp(sum(whole) / 6) == pytest.approx(dense, rel=1e-5)
    assert expected != pytest.approx(dense, rel=1e-3)
    assert type(model) is type(lively_model(family))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
