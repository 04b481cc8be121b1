import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_prune.errors import InputError
from lit_prune.export.run_folder import RunFolder
from lit_prune.files import write_text, written_aside


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
    with pytest.raises(InputError, match=r"`overwrite` replaces only what a run wrote, .* has none of report.json"):
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
    with pytest.raises(InputError, match="it is in use"):
        RunFolder(".", overwrite=True).claim()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_run_may_go_on_in_the_folder_of_its_checkpoint(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "a").holds(tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert not RunFolder(tmp_path / "a").holds(tmp_path / "b" / "checkpoints" / "last.ckpt")
    assert not RunFolder(tmp_path / "a").holds(None)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    with pytest.raises(InputError, match="`output` must be a folder, .* is a file"):
        RunFolder(tmp_path / "file").check()
    with pytest.raises(InputError, match="must be in a folder that can be written"):
        RunFolder(tmp_path / "file" / "run").check()
    with pytest.raises(InputError, match="must be in a folder that can be written"):
        RunFolder("/proc/run").check()


def test_written_aside_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with written_aside(target) as draft:
        draft.mkdir()
        (draft / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(RuntimeError, match="broken"), written_aside(target) as draft:  # noqa: PT012
        draft.mkdir()
        raise RuntimeError("broken")
    assert os.listdir(tmp_path) == ["model"]
    assert (target / "a").read_text() == "1"
    with written_aside(target) as draft:
        draft.mkdir()
    assert os.listdir(target) == []
    assert os.listdir(tmp_path) == ["model"]


def test_what_a_kill_left_is_cleared_and_a_model_between_two_names_has_its_own_again(tmp_path: Path) -> None:
    half, whole = tmp_path / ".model.partial-a" / "model", tmp_path / "deeper" / ".model.partial-b" / "model"
    for draft in (half, whole, whole.parent / "replaced"):
        draft.mkdir(parents=True)
        (draft / "a").write_text(draft.name)
    RunFolder(tmp_path, resume=True).claim()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "deeper/model/a"
    ]


def test_an_interrupt_between_two_names_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "model"
    target.mkdir()
    for renames, left in (("rename", "old"), ("replace", "new")):
        (target / "a").write_text("old")
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch, written_aside(target) as draft:  # noqa: PT012
            draft.mkdir()
            (draft / "a").write_text("new")
            patch.setattr(Path, renames, interrupt)
        assert os.listdir(tmp_path) == ["model"]
        assert (target / "a").read_text() == left


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_what_safetensors_keeps_to_itself_is_open_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        for target in (tmp_path / "statistics.safetensors", tmp_path / "model"):
            with written_aside(target) as draft:
                if target.suffix == "":
                    draft.mkdir()
                save_file({"weight": torch.zeros(1)}, draft if target.suffix else draft / "model.safetensors")
    finally:
        os.umask(before)
    for written in tmp_path.rglob("*.safetensors"):
        assert stat.S_IMODE(written.stat().st_mode) == mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "statistics.safetensors"]
