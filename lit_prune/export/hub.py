"""Upload of an exported folder to the Hugging Face hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lit_prune.errors import InputError
from lit_prune.export.formats.folder import ADAPTER_CONFIG, name_base

COMMIT_MESSAGE = "Model exported by lit_prune"


def check_repository(repo: str) -> None:
    """Checks the id of a repository without asking the hub, so that a typo is refused before any work.

    Raises:
        InputError: if ``repo`` is not a valid id, the hub is switched off, or there is no token for it.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"`push_to_hub` must be the id of a repository, such as name/model, got {repo!r}.") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"`push_to_hub` must be left out while HF_HUB_OFFLINE is set, got {repo!r}.")
    if get_token() is None:
        raise InputError(
            f"`push_to_hub` must be left out without a token of the hub, got {repo!r}: log in by `hf auth login`, or "
            "set HF_TOKEN."
        )


def push(folder: Path, repo: str) -> str:
    """Uploads ``folder`` to a repository on the hub, creates it as private if it does not exist, and returns its URL.

    In the uploaded config of an adapter that is saved beside the weights, the base model is ``repo`` itself: for a
    model on the hub, transformers and peft both load the base by that name.

    Raises:
        InputError: if the hub cannot be reached or refuses the upload. The folder is not changed.
    """
    hub = HfApi()
    try:
        address = hub.create_repo(repo, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=[ADAPTER_CONFIG], commit_message=COMMIT_MESSAGE
        )
        if (folder / ADAPTER_CONFIG).is_file():
            _upload_adapter_config(hub, folder, repo)
    except Exception as error:  # the http library's own connection errors share no base with those of the hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"`push_to_hub` must be a repository that can be written to, got {repo!r} ({reason}). The model is in "
            f"{folder}: upload it with `hf upload {repo} {folder}`."
        ) from error
    return str(address)


def _upload_adapter_config(hub: HfApi, folder: Path, repo: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / ADAPTER_CONFIG
        shutil.copyfile(folder / ADAPTER_CONFIG, copy)
        name_base(copy, repo)
        hub.upload_file(path_or_fileobj=copy, path_in_repo=ADAPTER_CONFIG, repo_id=repo, commit_message=COMMIT_MESSAGE)
