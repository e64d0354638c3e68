"""Files from the Hugging Face hub: from its cache, else downloaded. Every failure is one line.

Nothing of a repository is executed, only files are read. The client reads HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN
and HF_HOME as usual.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

# One short request decides whether the hub is reachable: its client would retry for most of a minute for each file.
PROBE_TIMEOUT_S = 5.0
MAIN = "main"
NOT_CACHED = "and the files are not in its cache here"
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFiles:
    """Files of one commit of a repository.

    Attributes:
        folder: where they lie, under their names in the repository.
        commit: its full hash, whatever branch or tag was asked for.
    """

    folder: Path
    commit: str


def hub_file(repository: str, file: str, revision: str | None, key: str, instead: str) -> HubFiles:
    """One file of a model repository; a cached one costs no connection.

    Args:
        repository: as in `organisation/name`.
        file: its name there.
        revision: commit, tag or branch; None = the main branch, or of it what the cache holds.
        key: the key and value that were asked for, as typed.
        instead: what can be done without the hub.

    Raises:
        UserError: it is not cached, and the hub cannot be reached, refuses or does not have it.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision or MAIN)
    if not isinstance(path, str):
        if absence := _absence():
            raise _refusal(key, f"{absence}, {NOT_CACHED}", instead)
        path = from_hub(key, instead, partial(hf_hub_download, repository, file, revision=revision))
    folder = Path(path)
    for _ in Path(file).parts:
        folder = folder.parent
    return HubFiles(folder, folder.name)


def hub_files(repository: str, patterns: list[str], revision: str, key: str, instead: str) -> HubFiles:
    """The files of a data set repository that match `patterns`; offline, those of them that are cached.

    Args:
        patterns: as of fnmatch, on names in the repository.
        repository, revision, key, instead: see `hub_file`.

    Raises:
        UserError: the hub cannot be reached, refuses, or has no such repository or revision.
    """
    from huggingface_hub import constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE
    if not offline:
        instead = f"{instead}, or set HF_HUB_OFFLINE=1 to use what is cached"
    load = partial(
        snapshot_download,
        repository,
        repo_type="dataset",
        revision=revision,
        allow_patterns=patterns,
        local_files_only=offline,
    )
    if not offline and (absence := _absence()):
        raise _refusal(key, absence, instead)
    folder = Path(from_hub(key, instead, load, online=not offline))
    return HubFiles(folder, folder.name)


def reachable() -> bool:
    """Whether the hub answers. HF_HUB_OFFLINE=1 means no without asking."""
    return _absence() is None


def from_hub(key: str, instead: str, load: Callable[[], T], online: bool = True) -> T:
    """Call `load()`; any failure becomes a UserError of one line.

    Args:
        key: the key and value that were asked for, as typed.
        instead: what to do without the hub.
        load: reads the hub, or only the libraries' cache where the hub is out of reach.
        online: whether the hub is `reachable`.

    Raises:
        UserError: it failed.
    """
    try:
        return load()
    except Exception as error:  # the libraries raise errors of half a dozen packages
        reason = _reason(error) if online else f"it cannot be reached, or HF_HUB_OFFLINE is set, {NOT_CACHED}"
        raise _refusal(key, reason, instead) from error


def tell_commit(key: str, asked: str | None, commit: str, pin: str) -> None:
    """Say which commit a branch or tag stood for, and how to stay with it.

    Args:
        key: what was loaded, as typed.
        asked: the revision that was asked for; nothing is said where it is the commit.
        commit: the commit that was loaded.
        pin: the key that takes it.
    """
    if asked != commit and COMMIT.fullmatch(commit):
        log.info(f"{key} is at commit {commit} of {asked or MAIN}; {pin}={commit} stays with it")


def _refusal(key: str, reason: str, instead: str) -> UserError:
    return UserError(f"{key} could not be read from the hub ({reason}): {instead}")


def _absence() -> str | None:
    """Why the hub is out of reach, by HF_HUB_OFFLINE or one request without retries; None if it answered."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_TIMEOUT_S)
    except Exception as error:  # the kind depends on the HTTP library that the client's version uses
        return f"it cannot be reached: {_said(error)}"
    return None


def _reason(error: Exception) -> str:
    """Why a file cannot be loaded. It searches the causes of the error too: libraries wrap the hub's errors."""
    from huggingface_hub import errors

    cause: BaseException | None = error
    while cause is not None:
        # subclasses first
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
    """What an error says, on one line that is not too long, or its kind."""
    return one_line(str(error))[:200] or type(error).__name__
