"""Calibration windows: the draw, BOS, and the first batches of a loader that is not ours."""

import pytest
import torch

from lit_prune.calibration.windows import (
    Calibration,
    Windows,
    batches_of,
    begin_with,
    draw_windows,
    first_batches,
    inputs_of,
)
from lit_prune.errors import InputError


def test_windows_are_on_the_grid_without_replacement_and_by_seed() -> None:
    stream = torch.arange(103)
    windows = draw_windows(stream, 10, 10, seed=0)
    assert sorted(windows.positions) == list(range(0, 100, 10))
    assert [int(window[0]) for window in windows.input_ids_NT] == windows.positions
    assert draw_windows(stream, 5, 10, seed=0).positions == draw_windows(stream, 5, 10, seed=0).positions
    assert draw_windows(stream, 5, 10, seed=0).positions != draw_windows(stream, 5, 10, seed=1).positions


def test_more_windows_than_there_are() -> None:
    with pytest.raises(InputError, match=r"`calibration.num_samples` must be at most 10, .*got 11"):
        draw_windows(torch.arange(103), 11, 10, seed=0)


def test_first_batches_of_a_foreign_loader() -> None:
    loader = [{"input_ids": torch.arange(12).view(3, 4), "attention_mask": torch.ones(3, 4), "labels": 0}] * 2
    found = first_batches(loader, Calibration(num_samples=4, seq_length=2))
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(3, 2), (1, 2)]
    assert found[0].keys() == {"input_ids", "attention_mask"}
    with pytest.raises(InputError, match="must be at most 6, .* got 7"):
        first_batches(loader, Calibration(num_samples=7))
    with pytest.raises(InputError, match="must be dicts with a tensor `input_ids`, got list"):
        first_batches([[1]], Calibration())


@pytest.mark.parametrize(("field", "value"), [("num_samples", 0), ("seq_length", 1), ("batch_size", 0)])
def test_calibration_out_of_range(field: str, value: int) -> None:
    with pytest.raises(InputError, match=f"`calibration.{field}` must be at least"):
        Calibration(**{field: value})


def test_windows_begin_with_one_bos() -> None:
    windows = torch.tensor([[5, 6, 7], [1, 5, 6]])
    assert begin_with(windows, 1).tolist() == [[1, 5, 6], [1, 5, 6]]
    assert begin_with(windows, None) is windows
    drawn, plain = draw_windows(torch.arange(103), 5, 10, seed=0, bos=7), draw_windows(torch.arange(103), 5, 10, seed=0)
    assert drawn.positions == plain.positions
    assert torch.equal(drawn.input_ids_NT[:, 1:], plain.input_ids_NT[:, :-1])
    assert drawn.input_ids_NT[:, 0].tolist() == [7] * 5


def test_batches_of_windows() -> None:
    windows = Windows(torch.arange(6).view(3, 2), [0, 2, 4])
    assert [batch["input_ids"].tolist() for batch in batches_of(windows, 2)] == [[[0, 1], [2, 3]], [[4, 5]]]


def test_a_model_is_called_with_what_it_takes() -> None:
    ids = torch.ones(1, 2)
    assert inputs_of({"input_ids": ids, "labels": ids, "position_ids": ids}).keys() == {"input_ids", "position_ids"}
