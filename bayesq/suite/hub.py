"""Files from the Hugging Face hub: from its cache if they are there, else fetched, and every failure is one line.

Nothing of a repository is executed, only files are read. HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and HF_HOME mean what
they mean everywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError

T = TypeVar("T")

# The hub's own client repeats a failed request for most of a minute, and does so for each file it looks for.
PROBE_TIMEOUT_S = 5.0
MAIN = "main"


@dataclass(frozen=True)
class HubFiles:
    """Files of one commit of a repository.

    Attributes:
        folder: where they lie, under their names in the repository.
        commit: its full hash, whatever branch or tag was asked for.
    """

    folder: Path
    commit: str


def hub_file(repository: str, file: str, revision: str | None, needs: str, instead: str) -> HubFiles:
    """One file of a model repository; a cached one costs no connection.

    Args:
        repository: as in `organisation/name`.
        file: its name there.
        revision: commit, tag or branch; None = the main branch, or of it what the cache holds.
        needs: what needs it, the beginning of the error line.
        instead: what can be done without the hub, the end of the error line.

    Raises:
        UserError: it is not cached, and the hub cannot be reached, refuses or does not have it.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision or MAIN)
    if not isinstance(path, str):
        with _explained(repository, revision, needs, instead):
            path = hf_hub_download(repository, file, revision=revision)
    folder = Path(path)
    for _ in Path(file).parts:
        folder = folder.parent
    return HubFiles(folder, folder.name)


def hub_files(repository: str, patterns: list[str], revision: str, needs: str, instead: str) -> HubFiles:
    """The files of a data set repository that match `patterns`; offline, those of them that are cached.

    Args:
        patterns: as of fnmatch, on names in the repository.
        repository, revision, needs, instead: see `hub_file`.

    Raises:
        UserError: the hub cannot be reached, refuses, or has no such repository or revision.
    """
    from huggingface_hub import constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE
    if not offline:
        instead = f"{instead}, or set HF_HUB_OFFLINE=1 to use what is cached"
    with _explained(repository, revision, needs, instead, probe=not offline):
        folder = Path(
            snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns=patterns, local_files_only=offline
            )
        )
    return HubFiles(folder, folder.name)


def reachable() -> bool:
    """Whether the hub answers. HF_HUB_OFFLINE=1 means no without asking."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _silence() is None


def from_hub(key: str, remedy: str, load: Callable[[], T], online: bool) -> T:
    """`load()`; whatever keeps it from finding its files becomes one line.

    Args:
        key: the key and value that were asked for, as typed.
        remedy: what to do without the hub.
        load: reads the hub, or only the libraries' cache where the hub is out of reach.
        online: whether the hub is `reachable`.

    Raises:
        UserError: it failed.
    """
    try:
        return load()
    except Exception as error:  # the libraries raise errors of half a dozen packages
        reason = _reason(error)
        if not online:
            reason = "it cannot be reached, or HF_HUB_OFFLINE is set, and the files are not in its cache here"
        raise UserError(f"{key} could not be read from the hub ({reason}): {remedy}") from error


@contextmanager
def _explained(repository: str, revision: str | None, needs: str, instead: str, probe: bool = True) -> Iterator[None]:
    """Run a transfer and say in one line why it failed."""
    from huggingface_hub import constants, errors

    where = f"{repository} at {revision}" if revision else repository
    if constants.HF_HUB_OFFLINE and probe:
        raise UserError(f"{needs}: {where} is not in the hub's cache, and HF_HUB_OFFLINE is set: {instead}")
    if probe:
        _probe(needs, instead)
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{needs}: {repository} is gated: accept its terms on the hub and log in (hf auth login), or {instead}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{needs}: the hub has no {repository} that you may read: {instead}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{needs}: {repository} has no revision {revision}: {instead}") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{needs}: {where} is not in the hub's cache and cannot be fetched: {instead}") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{needs}: {where} does not hold that: {instead}") from error
    except Exception as error:  # the transport's own errors depend on the HTTP library of the client's version
        raise UserError(f"{needs}: {where} cannot be fetched ({_reason(error)}): {instead}") from error


def _probe(needs: str, instead: str) -> None:
    """Make sure that the hub answers.

    Raises:
        UserError: it does not.
    """
    if error := _silence():
        raise UserError(f"{needs}, and the hub cannot be reached ({_reason(error)}): {instead}") from error


def _silence() -> Exception | None:
    """What became of one request without repetition; None if there was any answer at all."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_TIMEOUT_S)
    except Exception as error:  # as above
        return error
    return None


def _reason(error: Exception) -> str:
    """What an error says, on one line that is not too long, or its kind."""
    return one_line(str(error))[:200] or type(error).__name__
