import json
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import constants

from lit_prune.errors import InputError
from lit_prune.export import hub


class StandIn:
    """Records the calls that HfApi would get."""

    done: ClassVar[list[tuple[object, ...]]] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        self.done.append(("create", repo, private, exist_ok))
        return f"https://hub/{repo}"

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], commit_message: str
    ) -> None:
        if self.error is not None:
            raise self.error
        assert ignore_patterns == ["adapter_config.json"]
        self.done.append(("upload", repo_id, folder_path))

    def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str, commit_message: str) -> None:
        self.done.append(("upload", repo_id, path_in_repo, json.loads(path_or_fileobj.read_text())))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(hub, "HfApi", StandIn)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(StandIn, "done", [])
    monkeypatch.setattr(StandIn, "error", None)
    return StandIn


def test_the_folder_goes_into_a_repository_that_is_private_where_it_is_new(tmp_path: Path) -> None:
    assert hub.push(tmp_path, "me/model") == "https://hub/me/model"
    assert StandIn.done == [("create", "me/model", True, True), ("upload", "me/model", tmp_path)]


def test_an_adapter_names_the_repository_as_its_base(tmp_path: Path) -> None:
    local = {"base_model_name_or_path": "beside this file", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(local))
    hub.push(tmp_path, "me/model")
    uploaded = {"base_model_name_or_path": "me/model", "r": 8}
    assert StandIn.done[1:] == [
        ("upload", "me/model", tmp_path),
        ("upload", "me/model", "adapter_config.json", uploaded),
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == local


def test_a_failure_is_one_line_and_says_how_to_send_it_later(tmp_path: Path) -> None:
    StandIn.error = ConnectionError("no route\nto host")
    with pytest.raises(InputError, match=r"`push_to_hub` must be .*, got 'me/model' \(no route\)\. .*`hf upload me/m"):
        hub.push(tmp_path, "me/model")


def test_what_can_be_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.check_repository("me/model")
    with pytest.raises(InputError, match="`push_to_hub` must be the id of a repository, .*got 'a/b/c'"):
        hub.check_repository("a/b/c")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="`push_to_hub` must be left out while HF_HUB_OFFLINE is set"):
        hub.check_repository("me/model")


def test_a_token_is_asked_for_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="`push_to_hub` must be left out without a token .*: log in by"):
        hub.check_repository("me/model")
