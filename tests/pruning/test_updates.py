import torch

from lit_prune.pruning.updates import cast


def test_a_kept_weight_that_half_precision_would_round_to_zero_stays() -> None:
    cast_OI = cast(torch.tensor([[1e-9, 0.0, 2.0]]), torch.tensor([[True, False, True]]), torch.float16)
    assert (cast_OI != 0).tolist() == [[True, False, True]]
    assert cast_OI.dtype == torch.float16
