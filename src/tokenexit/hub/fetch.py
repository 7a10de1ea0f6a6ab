"""Weights are found in a local file, or in a model repository on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenexit.errors import CheckpointError

HUB_PREFIX = "hf-hub:"
DEFAULT_FILES = ("model.safetensors", "pytorch_model.bin")

_FORM = f"{HUB_PREFIX}OWNER/NAME[@REVISION][/FILE]"
_HUB_NAME = re.compile(
    re.escape(HUB_PREFIX) + r"(?P<repo>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^/\s]+))?(?:/(?P<file>[^\s]+))?"
)


def resolve_weights(source: str | Path) -> Path:
    """Return the local file behind `source`.

    source: a path (`~` allowed), or `hf-hub:OWNER/NAME[@REVISION][/FILE]`. Without FILE, `model.safetensors` is
        taken, else `pytorch_model.bin`. Hub files are fetched once and kept in the hub's own cache.

    Raises `CheckpointError` in one sentence: no such local file, a malformed hub name, no such repository, revision
    or file, no access, no connection.
    """
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return _fetch(source)
    path = Path(source).expanduser()
    if path.is_dir():
        raise CheckpointError(f"weights '{source}' is a folder: name the weight file in it.")
    if not path.is_file():
        raise CheckpointError(f"weights '{source}' is no file: check the path, or name a hub model as {_FORM}.")
    return path


def resolve_folder(source: str | Path, patterns: Sequence[str]) -> Path:
    """Return the local folder behind `source`: a path, or `hf-hub:OWNER/NAME[@REVISION]`.

    The files of a hub model that fit one of `patterns` are fetched. Raises `CheckpointError` as `resolve_weights`.
    """
    if not str(source).startswith(HUB_PREFIX):
        return Path(source)
    name = _parsed(str(source))
    with _explained(f"model '{source}'", name["repo"], name["revision"]):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name["repo"], revision=name["revision"], allow_patterns=list(patterns)))


def _fetch(source: str) -> Path:
    match = _parsed(source)
    repo, revision = match["repo"], match["revision"]
    files = (match["file"],) if match["file"] else DEFAULT_FILES
    offline = False
    with _explained(f"weights '{source}'", repo, revision):
        from huggingface_hub import errors, hf_hub_download

        for file in files:
            try:
                return Path(hf_hub_download(repo, file, revision=revision, local_files_only=offline))
            except errors.LocalEntryNotFoundError:  # a kind of EntryNotFoundError, so it comes first
                offline = True  # one round of retries is enough; the other file may be in the cache
            except errors.EntryNotFoundError:
                continue
    if offline:
        raise CheckpointError(
            f"weights '{source}': the hub cannot be reached and {' or '.join(files)} is not in its cache: "
            "check the connection, or download the file and give its path."
        )
    raise CheckpointError(
        f"weights '{source}': '{repo}' has no {' or '.join(files)}: name its weight file after a slash."
    )


def _parsed(source: str) -> re.Match[str]:
    match = _HUB_NAME.fullmatch(source)
    if match is None:
        raise CheckpointError(f"weights '{source}' is no hub name: write {_FORM}.")
    return match


@contextmanager
def _explained(what: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's library raises into one sentence."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"{what} needs the package huggingface_hub: pip install huggingface_hub, or give a local file."
        ) from None
    try:
        yield
    except errors.GatedRepoError:  # a kind of RepositoryNotFoundError
        raise CheckpointError(
            f"{what}: access to '{repo}' must be granted: accept its terms on the hub, then run 'hf auth login'."
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{what}: the hub has no model '{repo}' that you may read: check the name, or run 'hf auth login' for a "
            "private one."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{what}: '{repo}' has no revision '{revision}': name a branch, tag or commit it has."
        ) from None
    except errors.HFValidationError:
        raise CheckpointError(f"{what} is no hub name: write {_FORM}.") from None
    except Exception as error:  # connection errors change their type with the HTTP client's releases
        raise CheckpointError(
            f"{what} could not be fetched ({type(error).__name__}): "
            "check the connection, or download the file and give its path."
        ) from None
