"""Reading what llama.cpp's converter wrote."""

import torch

from lit_prune.export.gguf_file import _halves


def test_the_rows_of_a_head_by_hand() -> None:
    rows = torch.tensor([0, 2, 1, 3, 10, 12, 11, 13])  # two heads of 4 dimensions
    assert _halves(rows, 4).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert _halves(rows[:, None].expand(-1, 5), 4)[:, 4].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
