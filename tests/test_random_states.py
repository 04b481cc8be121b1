import io
import random

import numpy as np
import torch

from lit_prune.random_states import random_states, restore_random_states


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(1).item(),
    ]


def test_draws_go_on_where_they_were_after_a_save_and_a_load() -> None:
    random.gauss(0, 1)  # half a pair: the other half is part of the state
    np.random.randn()
    buffer = io.BytesIO()
    torch.save(random_states(), buffer)
    first, other = draws(), draws()
    assert first != other
    buffer.seek(0)
    restore_random_states(torch.load(buffer, weights_only=True))
    assert draws() == first
    assert draws() == other
