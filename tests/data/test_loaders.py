from typing import Any

import pytest
import torch

from lit_prune.data.loaders import PaddedDataset, ResumableLoader


class Numbers(torch.utils.data.Dataset):
    """Counts what is read of it."""

    def __init__(self, count: int = 11) -> None:
        self.count, self.read = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.read += 1
        return index


def loader(seed: int = 3, workers: int = 0) -> ResumableLoader:
    return ResumableLoader(Numbers(), batch_size=2, seed=seed, num_workers=workers)


def epoch(of: ResumableLoader, number: int = 0) -> list[list[int]]:
    of.sampler.set_epoch(number)
    return [batch.tolist() for batch in of]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    one, other = loader(), loader()
    assert epoch(one, 1) == epoch(other, 1) == epoch(one, 1)
    assert epoch(one, 0) != epoch(one, 1)
    assert epoch(one, 0) != epoch(loader(seed=4), 0)
    assert sorted(index for batch in epoch(one, 2) for index in batch) == list(range(11))
    assert len(one) == 6


def test_the_first_epoch_has_the_order_of_a_plain_shuffled_loader() -> None:
    plain = torch.utils.data.DataLoader(
        Numbers(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    assert epoch(loader()) == [batch.tolist() for batch in plain]


@pytest.mark.parametrize("workers", [0, 1])
def test_it_goes_on_where_it_was_and_skips_without_reading(workers: int) -> None:
    first = loader(workers=workers)
    whole = epoch(first, 1)
    first.sampler.set_epoch(1)
    batches = iter(first)
    assert [next(batches).tolist() for _ in range(2)] == whole[:2]
    state = first.state_dict()
    assert state == {"epoch": 1, "batches": 2}
    second = loader(workers=workers)
    second.load_state_dict(state)
    assert epoch(second, 1) == whole[2:]
    assert second.dataset.read in (0, 7)  # 11 items, 4 of them skipped; workers count for themselves
    assert second.state_dict() == {"epoch": 1, "batches": 6}
    assert epoch(second, 2) == epoch(loader(), 2)  # whole again


def test_the_end_of_an_epoch_is_the_beginning_of_the_next() -> None:
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "batches": 6})
    assert epoch(resumed, 1) == epoch(loader(), 1)


def test_who_reads_aside_leaves_the_position() -> None:
    one, other = loader(), loader()
    training, undisturbed = iter(one), iter(other)
    for _ in range(3):
        next(training), next(undisturbed)
    with one.position_preserved():
        one.sampler.set_epoch(4)
        assert [batch.tolist() for batch in one] == epoch(loader(), 4)
    assert one.state_dict() == other.state_dict() == {"epoch": 0, "batches": 3}
    assert [batch.tolist() for batch in training] == [batch.tolist() for batch in undisturbed]
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "batches": 3})
    with resumed.position_preserved():
        assert len(list(resumed)) == 6
    assert epoch(resumed) == epoch(loader())[3:]


def test_it_draws_nothing_from_the_global_random_numbers() -> None:
    before = torch.get_rng_state()
    epoch(loader())
    assert torch.equal(torch.get_rng_state(), before)


def test_added_items_predict_nothing_and_the_others_are_as_they_were() -> None:
    rows = [torch.arange(4) + 10 * index for index in range(5)]
    items: Any = [{"input_ids": row} for row in rows]
    assert PaddedDataset(items, 5)[4] == items[4]  # none has to be added
    evened = PaddedDataset(items, 3)
    found = [evened[index] for index in range(len(evened))]
    assert len(found) == 6
    assert all(torch.equal(item["labels"], row) for item, row in zip(found[:5], rows, strict=True))
    assert torch.equal(found[5]["labels"], torch.full((4,), -100))
    assert torch.equal(found[5]["input_ids"], rows[0])
    answers: Any = [{"input_ids": row, "labels": row.masked_fill(row < 2, -100)} for row in rows]
    assert PaddedDataset(answers, 2)[0]["labels"].tolist() == [-100, -100, 2, 3]
