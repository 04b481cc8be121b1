"""Sends an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lit_prune.errors import InputError


def check_repository(repo: str) -> None:
    """Asks what can be asked before there is anything to send.

    Raises:
        InputError: for a name that no repository can have, or where the hub is switched off.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"`push_to_hub` must be the id of a repository, such as name/model, got {repo!r}.") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"`push_to_hub` must be left out where HF_HUB_OFFLINE is set, got {repo!r}.")


def push(folder: Path, repo: str) -> str:
    """Uploads ``folder`` to the hub, into a repository that is made private where there is none; returns its address.

    Raises:
        InputError: if the hub cannot be reached or refuses; the folder is as it was.
    """
    hub = HfApi()
    try:
        address = hub.create_repo(repo, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model exported by lit_prune")
    except Exception as error:  # the http library's own connection errors share no base with those of the hub
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"`push_to_hub` must be a repository that can be written to, {repo!r} cannot ({told}). The model is in "
            f"{folder}: send it with `hf upload {repo} {folder}`."
        ) from error
    return str(address)
