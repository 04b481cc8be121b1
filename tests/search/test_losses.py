"""The losses of a search in a file."""

from pathlib import Path

import pytest

from lit_prune.errors import InputError
from lit_prune.search.losses import MeasuredLosses

KEY = {"weights": "a" * 64, "sparsity": 0.5, "versions": {"torch": "2.13", "lit_prune": "1"}, "sizes": [1, 2]}


def written(path: Path) -> str:
    measured = MeasuredLosses(str(path))
    measured.losses = {((3, -3), 0): 1.5, ((3, -3), 4): 0.1 + 0.2}
    measured.save(KEY, [0.3, 0.7])
    return str(path)


def test_losses_come_back_as_they_were(tmp_path: Path) -> None:
    read = MeasuredLosses(written(tmp_path / "state.json"))
    assert read.losses == {((3, -3), 0): 1.5, ((3, -3), 4): 0.1 + 0.2}
    read.check_key(KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_nothing_new_is_not_written(tmp_path: Path) -> None:
    read = MeasuredLosses(written(tmp_path / "state.json"))
    (tmp_path / "state.json").unlink()
    read.save(KEY, [0.3, 0.7])
    assert list(tmp_path.iterdir()) == []
    read.losses[(1, -1), 0] = 1.0
    read.save(KEY, [0.3, 0.7])
    assert len(MeasuredLosses(str(tmp_path / "state.json")).losses) == 3


def test_the_losses_of_mixtures_are_kept_before_there_are_others(tmp_path: Path) -> None:
    path = str(tmp_path / "state.json")
    measured = MeasuredLosses(path)
    measured.mixtures["equal shares"] = 0.5
    measured.save({"sparsity": 0.5}, [])
    read = MeasuredLosses(path)
    assert read.mixtures == {"equal shares": 0.5}
    read.check_key(KEY)  # which has entries that were not known then
    with pytest.raises(InputError, match="`sparsity` 0.5, now 0.6"):
        read.check_key(KEY | {"sparsity": 0.6})
    read.losses[(1, -1), 0] = 1.0
    read.save(KEY, [0.3, 0.7])
    with pytest.raises(InputError, match="other sizes"):
        MeasuredLosses(path).check_key(KEY | {"sizes": [2, 1]})
    assert MeasuredLosses(path).mixtures == {"equal shares": 0.5}


def test_without_a_file_losses_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    measured = MeasuredLosses(None)
    measured.losses[(1, -1), 0] = 1.0
    measured.check_key(KEY)
    measured.save(KEY, [0.5])
    assert measured.losses == {((1, -1), 0): 1.0}
    assert list(tmp_path.iterdir()) == []
    assert MeasuredLosses(None).losses == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0.7}, r"of another: `sparsity` 0.5, now 0.7\. Change it back, or choose another"),
        ({"weights": "b" * 64, "sizes": [2, 1]}, "of another: other weights; other sizes"),
        ({"versions": {"torch": "2.14", "lit_prune": "1"}}, "of another: `versions torch` 2.13, now 2.14"),
        ({"method": "Wanda()"}, r"of another: `method` None, now Wanda\(\)"),
    ],
)
def test_a_state_of_another_search(change: dict[str, object], message: str, tmp_path: Path) -> None:
    read = MeasuredLosses(written(tmp_path / "state.json"))
    with pytest.raises(InputError, match=r"`Search.state` must be of the same search, .*state.json is " + message):
        read.check_key(KEY | change)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"key": {}, "losses": [[1]]}', '{"key": 3, "losses": []}'])
def test_a_file_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(InputError, match=r"`Search.state` must be a file that a search wrote, .* is not; choose"):
        MeasuredLosses(str(tmp_path / "state.json"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`Search.state` must be a file in a folder that exists, got .*none/state"):
        MeasuredLosses(str(tmp_path / "none" / "state.json"))
    with pytest.raises(InputError, match=r"`Search.state` must be a file that a search wrote"):
        MeasuredLosses(str(tmp_path))
