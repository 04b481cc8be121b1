"""The folder of a run is made late, replaced only by a run that succeeds, and removed where nothing is left in it."""

from pathlib import Path

import pytest

from lit_prune.errors import InputError
from lit_prune.export.run_folder import RunFolder
from lit_prune.files import write_text


def test_nothing_is_made_before_the_claim(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    folder.check()
    assert list(tmp_path.iterdir()) == []
    folder.claim()
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_exists_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "x")
    with pytest.raises(InputError, match=r"`output` must be a new folder, .*`--output DIR`.*`--overwrite`"):
        RunFolder(tmp_path).check()
    RunFolder(tmp_path, resume=True).claim()
    assert (tmp_path / "x").exists()


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    RunFolder(tmp_path).claim()


def test_what_is_replaced_is_kept_until_the_end(tmp_path: Path) -> None:
    old = tmp_path / "run"
    old.mkdir()
    write_text(old / "x", "old")
    with pytest.raises(InputError, match=r"`overwrite` replaces only the folder of a run, .* has none of report.json"):
        RunFolder(old, overwrite=True).check()
    write_text(old / "report.json", "{}")
    folder = RunFolder(old, overwrite=True)
    folder.claim()
    assert list(old.iterdir()) == []
    assert folder.replaced is not None
    assert (folder.replaced / "x").read_text() == "old"
    folder.finish()
    assert folder.replaced is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_working_directory_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "report.json", "{}")
    with pytest.raises(InputError, match="which is in use"):
        RunFolder(".", overwrite=True).claim()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_run_may_go_on_in_the_folder_of_its_checkpoint(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "a").holds(tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert not RunFolder(tmp_path / "a").holds(tmp_path / "b" / "checkpoints" / "last.ckpt")
    assert not RunFolder(tmp_path / "a").holds(None)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    with pytest.raises(InputError, match="`output` must be a folder, got the file"):
        RunFolder(tmp_path / "file").check()
    with pytest.raises(InputError, match="must be in a folder that can be written"):
        RunFolder(tmp_path / "file" / "run").check()
    with pytest.raises(InputError, match="must be in a folder that can be written"):
        RunFolder("/proc/run").check()


def test_what_a_kill_left_is_cleared_and_a_model_between_two_names_has_its_own_again(tmp_path: Path) -> None:
    half, whole = tmp_path / ".model.partial-a" / "model", tmp_path / "deeper" / ".model.partial-b" / "model"
    for draft in (half, whole, whole.parent / "replaced"):
        draft.mkdir(parents=True)
        (draft / "a").write_text(draft.name)
    RunFolder(tmp_path, resume=True).claim()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "deeper/model/a"
    ]


def test_the_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = RunFolder("~/run")
    folder.claim()
    assert (tmp_path / "run").is_dir()
    assert folder.holds("~/run/checkpoints/last.ckpt")


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_of_a_failed_run_is_removed(tmp_path: Path, exists: bool) -> None:
    run = tmp_path / "run"
    if exists:
        run.mkdir()
    folder = RunFolder(run)
    folder.claim()
    write_text(run / "config.yaml", "a: 1")
    assert folder.give_up()
    assert list(tmp_path.iterdir()) == []
    RunFolder(run).check()


@pytest.mark.parametrize("left", ["model/config.json", "checkpoints/last.ckpt"])
def test_a_folder_with_something_to_go_on_from_stays(tmp_path: Path, left: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    (folder.path / left).parent.mkdir()
    write_text(folder.path / left, "x")
    assert not folder.give_up()
    assert (folder.path / left).exists()


def test_only_what_this_run_made_is_removed(tmp_path: Path) -> None:
    write_text(tmp_path / "config.yaml", "of the run that is resumed")
    resumed, finished = RunFolder(tmp_path, resume=True), RunFolder(tmp_path / "run")
    resumed.claim()
    finished.claim()
    finished.finish()
    for folder in (RunFolder(tmp_path), resumed, finished):  # the first was refused, and claimed nothing
        assert not folder.give_up()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "run"]


def test_the_refusal_of_a_folder_says_how_an_unfinished_fit_in_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(InputError, match=r"did not finish: `--ckpt_path last` continues it\.$"):
        RunFolder(tmp_path).check()
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=r"`--overwrite`\.$"):
        RunFolder(tmp_path).check()
