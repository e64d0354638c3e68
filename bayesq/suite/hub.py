"""Files of the Hugging Face hub, from its cache or downloaded. Every failure is a one-line UserError.

No code of a repository is executed. HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and HF_HOME work as usual.
"""

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

# One short request tests whether the hub is reachable: its client would retry for most of a minute for each file.
PROBE_TIMEOUT_S = 5.0
MAIN = "main"
NOT_CACHED = "and the files are not in its cache here"
COMMIT = re.compile("[0-9a-f]{40}")


def hub_file(repository: str, file: str, revision: str | None, key: str, instead: str) -> Path:
    """Folder of one commit of a model repository that holds `file`; a cached file needs no connection.

    The folder's name is the commit. If a branch or tag was requested, the commit is logged.

    Args:
        revision: commit, tag or branch; None = the main branch, or the cached commit of it.
        key: the requested key and value, as typed.
        instead: what the user can do without the hub.

    Raises:
        UserError: the file is not cached, and the hub cannot be reached, refuses access or does not have the file.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision or MAIN)
    if not isinstance(path, str):
        asked = key if revision is None else f"{key} at model.revision={revision}"
        if absence := _absence():
            raise _refusal(asked, f"{absence}, {NOT_CACHED}", instead)
        path = from_hub(asked, instead, partial(hf_hub_download, repository, file, revision=revision))
    folder = Path(path).parents[len(Path(file).parts) - 1]
    tell_commit(key, revision, folder.name, "model.revision")
    return folder


def hub_files(repository: str, patterns: list[str], revision: str | None, key: str, instead: str) -> Path:
    """Like `hub_file`, for the files of a data set repository whose names match one of the fnmatch `patterns`.

    With HF_HUB_OFFLINE=1, only cached files are read.

    Raises:
        UserError: the hub cannot be reached, refuses access, or has no such repository or revision.
    """
    from huggingface_hub import constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE
    if not offline:
        instead = f"{instead}, or set HF_HUB_OFFLINE=1 to use what is cached"
        if absence := _absence():
            raise _refusal(key, absence, instead)
    options = {"repo_type": "dataset", "revision": revision or MAIN, "allow_patterns": patterns}
    load = partial(snapshot_download, repository, local_files_only=offline, **options)
    folder = Path(from_hub(key, instead, load, online=not offline))
    tell_commit(key, revision, folder.name, "dataset.revision")
    return folder


def dataset_files(repository: str, revision: str) -> list[str]:
    """Names of the files of a commit of a data set repository, for a message; none if the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return sorted(HfApi().list_repo_files(repository, repo_type="dataset", revision=revision))
    except Exception:  # the message then has no list
        return []


def reachable() -> bool:
    """Whether the hub answers; with HF_HUB_OFFLINE=1, False without a request."""
    return _absence() is None


def from_hub(key: str, instead: str, load: Callable[[], T], online: bool = True) -> T:
    """Call `load()` and turn any failure into a UserError of one line; `key` and `instead` as in `hub_file`.

    If the hub is not `online`, `load` reads only the libraries' cache.
    """
    try:
        return load()
    except Exception as error:  # the libraries raise errors of many packages
        reason = _reason(error) if online else f"it cannot be reached, or HF_HUB_OFFLINE is set, {NOT_CACHED}"
        raise _refusal(key, reason, instead) from error


def tell_commit(key: str, asked: str | None, commit: str, pin: str) -> None:
    """Log the commit of a requested branch or tag, and the setting `pin`=COMMIT that pins it."""
    if asked != commit and COMMIT.fullmatch(commit):
        log.info(f"{key} is at commit {commit} of {asked or MAIN}; {pin}={commit} pins it")


def _refusal(key: str, reason: str, instead: str) -> UserError:
    return UserError(f"{key} could not be read from the hub ({reason}): {instead}")


def _absence() -> str | None:
    """Why the hub cannot be used (HF_HUB_OFFLINE, or one request failed); None if it answered."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_TIMEOUT_S)
    except Exception as error:  # its class depends on the HTTP library of the client
        return f"it cannot be reached: {_said(error)}"
    return None


def _reason(error: Exception) -> str:
    """Why a file cannot be loaded, from the error or its causes: libraries wrap the hub's errors."""
    from huggingface_hub import errors

    cause: BaseException | None = error
    while cause is not None:
        # The order matters: GatedRepoError is a subclass of RepositoryNotFoundError.
        if isinstance(cause, errors.GatedRepoError):
            return "it is gated: accept its terms on the hub and log in with `hf auth login`"
        if isinstance(cause, errors.RepositoryNotFoundError):
            return "there is no such repository, or none that you may read"
        if isinstance(cause, errors.RevisionNotFoundError):
            return "it has no such revision"
        if isinstance(cause, errors.EntryNotFoundError) and not isinstance(cause, errors.LocalEntryNotFoundError):
            return "it does not hold that file"
        cause = cause.__cause__ or cause.__context__
    return _said(error)


def _said(error: Exception) -> str:
    """The message of an error in one line of at most 200 characters, or its class if it has none."""
    return one_line(str(error))[:200] or type(error).__name__
