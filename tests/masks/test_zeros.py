import pytest
import torch

from lit_prune.allocate import Uniform
from lit_prune.masks.zeros import cast, zeros
from lit_prune.models import structure
from lit_prune.models.families import find_blocks
from lit_prune.pipeline import score
from lit_prune.pruning import Magnitude
from lit_prune.recipe import Recipe
from lit_prune.recover import MaskedLoRA
from lit_prune.recover.existing_masks import take_zeros
from tests.conftest import small_model


def test_zeros() -> None:
    assert zeros([torch.tensor([0.0, 1.0]), torch.tensor([-0.0])]) == (2, 3)


@pytest.mark.parametrize(("share", "before"), [(0.2, 0.0), (0.3, 0.3)])
def test_zeros_of_rounding_are_no_earlier_cut(share: float, before: float) -> None:
    model = small_model()
    for block in find_blocks(model):
        for linear in block.linears.values():
            threshold = linear.weight_OI.abs().quantile(share)
            linear.write(linear.weight_OI * (linear.weight_OI.abs() > threshold))
    ids = torch.ones(1, 8, dtype=torch.long)
    assert score(model, [ids], Recipe(Magnitude(), 0.5, Uniform())).sparsity_before == pytest.approx(before, abs=0.01)
    take_zeros(model, None, MaskedLoRA())
    assert structure.masked(model) is (before > 0)


def test_a_kept_weight_that_half_precision_would_round_to_zero_stays() -> None:
    cast_OI = cast(torch.tensor([[1e-9, 0.0, 2.0]]), torch.tensor([[True, False, True]]), torch.float16)
    assert (cast_OI != 0).tolist() == [[True, False, True]]
    assert cast_OI.dtype == torch.float16
