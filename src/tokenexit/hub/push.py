"""Saved models are pushed to the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from tokenexit.errors import CheckpointError
from tokenexit.hub.card import CARD_FILE, may_write


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload model",
) -> str:
    """Upload a saved model to a repository of the hub, in one commit. A card there that somebody else wrote is left.

    Args:
        folder: the saved model.
        repo_id: OWNER/NAME, made if it is not there.
        private: whether a new repository is private, the owner's default if not given.
        token: access token, that of `hf auth login` if not given.
        revision: branch to push to, made if it is not there.
        message: message of the commit.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: if huggingface_hub is missing, and for a malformed name, no right to write, no connection.
    """
    try:
        from huggingface_hub import HfApi, errors
    except ImportError:
        raise CheckpointError(
            f"pushing to '{repo_id}' needs the package huggingface_hub: pip install huggingface_hub."
        ) from None
    without_places(folder)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        own_card = _has_own_card(api, repo_id, revision)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=[CARD_FILE] if own_card else None,
        )
    except errors.HFValidationError:
        raise CheckpointError(f"repo_id='{repo_id}' is no name on the hub: write OWNER/NAME.") from None
    except Exception as error:  # connection errors change their type with the HTTP client's releases
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise CheckpointError(
                f"the hub does not let you write to '{repo_id}': check the owner, or run 'hf auth login' with a token "
                "that may write."
            ) from None
        raise CheckpointError(
            f"'{repo_id}' could not be pushed ({type(error).__name__}): check the connection; save_pretrained "
            "keeps the model here."
        ) from None
    return f"{api.endpoint}/{repo_id}"


def without_places(folder: Path) -> None:
    """Shorten absolute paths in the JSON files of a saved model to their last part: the rest concerns one machine."""
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(_shortened(json.loads(path.read_text())), indent=2) + "\n")


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _has_own_card(api: Any, repo_id: str, revision: str | None) -> bool:
    if not api.file_exists(repo_id, CARD_FILE, revision=revision):
        return False
    return not may_write(Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision)))
