"""Files of the Hugging Face hub: from the local cache, else downloaded, else one clear error within seconds."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from cbq.errors import InputError

CONNECT_TIMEOUT_SECONDS = 3.0
# A name server that does not answer is not covered by the timeout of the request, so a thread is waited for instead.
ANSWER_TIMEOUT_SECONDS = 4.0


def fetch_file(repo_id: str, filename: str, repo_type: str = "dataset", revision: str | None = None) -> Path:
    """Return the local path of one file of a hub repository, downloaded only if the cache does not have it.

    Args:
        repo_id: the repository, such as `Salesforce/wikitext`.
        filename: the file's path inside the repository.
        repo_type: `dataset` or `model`.
        revision: a branch, tag or commit; the main branch if None.

    Raises:
        InputError: the file is not cached, and the hub cannot be reached or does not give it.
    """
    cached = try_to_load_from_cache(repo_id, filename, revision=revision, repo_type=repo_type)
    if isinstance(cached, str):  # the cache can also say that the file is known not to exist
        return Path(cached)
    check_reachable(repo_id, repo_type, revision, wanted=f"{repo_id}: {filename}")
    return Path(
        _download(
            lambda: hf_hub_download(
                repo_id, filename, revision=revision, repo_type=repo_type, etag_timeout=CONNECT_TIMEOUT_SECONDS
            ),
            f"{repo_id}: {filename}",
        )
    )


def fetch_snapshot(
    repo_id: str, patterns: list[str], is_complete: Callable[[Path], bool], revision: str | None = None
) -> Path:
    """Return the local folder of a model repository, downloaded only if the cache does not have all of it.

    The folder has the name of the commit.

    Args:
        repo_id: the repository, such as `huggyllama/llama-7b`.
        patterns: the files to download, as shell patterns.
        is_complete: says of a cached folder whether it has everything that is needed; an interrupted download has not.
        revision: a branch, tag or commit; the main branch if None.

    Raises:
        InputError: the id is malformed, or the folder is not cached and the hub cannot be reached or does not give it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is neither a folder nor a hub id: {first_line(error)}") from error
    try:
        cached = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=patterns))
        if is_complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    wanted = repo_id if revision is None else f"{repo_id} at {revision}"
    check_reachable(repo_id, "model", revision, wanted)
    return Path(
        _download(
            lambda: snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, etag_timeout=CONNECT_TIMEOUT_SECONDS
            ),
            wanted,
        )
    )


def check_reachable(repo_id: str, repo_type: str, revision: str | None, wanted: str) -> None:
    """Ask the hub once about a repository, and wait a few seconds at most for the answer.

    Args:
        repo_id: the repository.
        repo_type: `dataset` or `model`.
        revision: a branch, tag or commit; the main branch if None.
        wanted: what the error says that is missing.

    Raises:
        InputError: no answer in time, or the answer is that there is no such repository or revision.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=CONNECT_TIMEOUT_SECONDS)
            outcome.append(None)
        except Exception as error:  # whatever it is, the waiting side reports it
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_TIMEOUT_SECONDS)
    error = outcome[0] if outcome else TimeoutError(f"no answer in {ANSWER_TIMEOUT_SECONDS:g} seconds")
    if error is not None:
        raise InputError(_explain(error, wanted)) from error


def _download(action: Callable[[], Any], wanted: str) -> Any:
    """Run a download, and turn the failures that are not ours into an InputError."""
    try:
        return action()
    except (HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(_explain(error, wanted)) from error


def _explain(error: Exception, wanted: str) -> str:
    """Return the one line that says why something could not be fetched, and what to do."""
    match error:
        case GatedRepoError():
            reason = "the repository is gated: ask for access on its page and log in with `hf auth login`"
        case RevisionNotFoundError():
            reason = "the repository has no such revision"
        case RepositoryNotFoundError():
            reason = "the hub has no such repository, or it is private and you are not logged in"
        case LocalEntryNotFoundError():  # is an EntryNotFoundError too, but means a lost connection
            reason = f"the download failed ({first_line(error)})"
        case EntryNotFoundError():
            reason = "the repository has no such file"
        case OfflineModeIsEnabled():
            reason = "HF_HUB_OFFLINE forbids to ask the hub"
        case _:
            reason = f"the hub cannot be reached ({type(error).__name__}: {first_line(error)})"
    return f"{wanted} is not in the local hub cache ({constants.HF_HUB_CACHE}) and {reason}; a local folder works too"


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text: errors of the hub and of transformers run over pages.

    Example:
        >>> first_line(OSError("not found\\nsee https://..."))
        'not found'
    """
    return str(error).strip().split("\n")[0]
